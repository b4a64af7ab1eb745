"""Packed rows through the families' own language models against every completion in a row of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_varlen import PlainVarlen
from tiny_models import TINY_FAMILIES, build_tiny_model

from mrpo.backbones import load_model
from mrpo.backbones.attention import prefix_arguments, use_prefix_attention
from mrpo.config import ModelConfig
from mrpo.kernels import prefix_flash
from mrpo.kernels.prefix_attention import AttentionName, PrefixLayout, compilations

GROUPS, LENGTH = [(7, [3, 0, 5]), (4, [6]), (9, [2, 1, 4, 3])], 52


@pytest.fixture(autouse=True)
def _plain_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_flash, "default_primitive", PlainVarlen)


def load(folder: Path) -> Any:
    return load_model(ModelConfig(path=str(folder))).train()


def embeddings(length: int) -> torch.Tensor:
    return torch.randn(1, length, 64, generator=torch.Generator().manual_seed(5))


def states(model: Any, inputs: torch.Tensor, positions: torch.Tensor, **arguments: Any) -> torch.Tensor:
    position_ids = positions[None] if model.config.model_type == "internvl" else positions.expand(3, 1, -1)
    text = model.model.language_model
    return text(inputs_embeds=inputs, position_ids=position_ids, use_cache=False, **arguments).last_hidden_state


def packed(model: Any, implementation: AttentionName | None) -> torch.Tensor:
    """(tokens, 64) hidden states of prompts and completions, in order."""
    positions = torch.zeros(LENGTH, dtype=torch.long)
    place = 0
    for prompt, completions in GROUPS:
        for start, size in ((0, prompt), *((prompt, size) for size in completions)):
            positions[place : place + size] = start + torch.arange(size)
            place += size
    layout = PrefixLayout.make(GROUPS, LENGTH)
    return states(model, embeddings(LENGTH), positions, **prefix_arguments(layout, implementation))[0, :place]


def apart(model: Any) -> torch.Tensor:
    """The same, prompts alone and every completion in a row of its own behind a copy of its prompt."""
    inputs, parts, place = embeddings(LENGTH), [], 0
    for prompt, completions in GROUPS:
        first = inputs[:, place : place + prompt]
        place += prompt
        for number, size in enumerate((0, *completions)):
            row = torch.cat([first, inputs[:, place : place + size]], 1)
            place += size
            parts.append(states(model, row, torch.arange(row.shape[1]))[0, prompt if number else 0 :])
    return torch.cat(parts)


def gradients(model: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
    model.zero_grad()
    (hidden * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("implementation", [None, "sdpa", "flash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_row_equals_rows_apart_with_every_gradient(
    family: str, implementation: AttentionName | None, checkpointing: bool, tiny_folder: Callable[[str], Path]
) -> None:
    plain, model = load(tiny_folder(family)), load(tiny_folder(family))
    use_prefix_attention(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    truth, found = apart(plain), packed(model, implementation)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    expected, ours = gradients(plain, truth), gradients(model, found)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_flex_through_the_layers(family: str, tiny_folder: Callable[[str], Path]) -> None:
    plain, model = load(tiny_folder(family)), load(tiny_folder(family))
    use_prefix_attention(model)
    with torch.no_grad():  # on the CPU it has no backward pass
        torch.testing.assert_close(packed(model, "flex"), apart(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_dense_rows_and_generation_stay_as_they_are(family: str, tiny_folder: Callable[[str], Path]) -> None:
    plain, model = load(tiny_folder(family)), load(tiny_folder(family))
    use_prefix_attention(model)
    assert model.config.vision_config._attn_implementation == plain.config.vision_config._attn_implementation
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    outputs = [m.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state for m in (plain, model)]
    assert torch.equal(*outputs)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(m.eval().generate(ids, **options) for m in (plain, model)))


@pytest.mark.parametrize("implementation", ["sdpa", "flex", "flash"])
def test_a_compiled_layer_is_one_graph(implementation: AttentionName, tiny_folder: Callable[[str], Path]) -> None:
    torch._dynamo.reset()
    model = load(tiny_folder("qwen3_vl"))
    use_prefix_attention(model)
    with torch.no_grad():
        truth = packed(model, implementation)
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True, backend="eager", fullgraph=True)
        before = compilations()
        torch.testing.assert_close(packed(model, implementation), truth, rtol=1e-5, atol=1e-5)
    assert compilations() == before + 1  # all layers share it
    torch._dynamo.reset()


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    model = load(build_tiny_model("internvl", tmp_path, use_sliding_window=True, sliding_window=4, max_window_layers=0))
    use_prefix_attention(model)
    with pytest.raises(ValueError, match=r"set update\.packing=dense"):
        packed(model, "sdpa")
