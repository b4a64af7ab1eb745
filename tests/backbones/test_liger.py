"""liger's kernels against transformers' layers: on a GPU, and its RoPE under Triton's interpreter.

The interpreter cannot run liger's RMSNorm and SwiGLU; there, plain functions stand in for them, and the test says that
they are given the right arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_FAMILIES

from mrpo.backbones import load_model
from mrpo.backbones.liger import apply_liger
from mrpo.config import ModelConfig

pytest.importorskip("liger_kernel")


def outputs(model: Any, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = model.to(device)
    ids = torch.arange(1, 25, device=device).reshape(2, 12)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    generator = torch.Generator().manual_seed(3)
    (hidden * torch.randn(hidden.shape, generator=generator).to(hidden)).sum().backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach().cpu(), gradients


def check(family: str, folder: Path, device: str) -> None:
    plain, patched = (load_model(ModelConfig(path=str(folder))) for _ in range(2))
    layers = len(plain.model.language_model.layers)
    norms = 4 if family == "qwen3_vl" else 2
    assert apply_liger(patched) == layers * (norms + 2) + 1
    hidden, gradients = outputs(plain, device)
    hidden_liger, gradients_liger = outputs(patched, device)
    torch.testing.assert_close(hidden_liger, hidden, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == gradients_liger.keys()
    for name, gradient in gradients.items():
        error = (gradients_liger[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_same_numbers_under_the_interpreter(
    family: str, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from liger_kernel.transformers import functional

    def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr(functional, "liger_rms_norm", rms_norm)
    monkeypatch.setattr(functional, "liger_swiglu", swiglu)
    check(family, tiny_folder(family), "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_the_same_numbers_on_a_gpu(family: str, tiny_folder: Callable[[str], Path]) -> None:
    check(family, tiny_folder(family), "cuda")


def test_another_model_of_the_class_keeps_its_layers(tiny_folder: Callable[[str], Path]) -> None:
    patched, other = (load_model(ModelConfig(path=str(tiny_folder("qwen3_vl")))) for _ in range(2))
    apply_liger(patched)

    def changed(module: torch.nn.Module) -> int:
        return sum("forward" in vars(part) for part in module.modules())

    assert changed(patched.model.language_model) == 19
    assert changed(other.model.language_model) == 0
    assert changed(patched.model.visual) == changed(other.model.visual)
