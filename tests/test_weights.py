"""Weights as a checkpoint holds them, against what transformers and peft themselves write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_FAMILIES, build_tiny_model

from mrpo.backbones import load_model
from mrpo.backbones.lora import merged_state_dict
from mrpo.config import ModelConfig
from mrpo.errors import UserError
from mrpo.weights import checkpoint_names, checkpoint_weights


def _load(folder: Path) -> Any:
    return load_model(ModelConfig(path=str(folder)))


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_names_and_tensors_are_those_of_the_checkpoint(family: str, tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder(family)
    model = _load(folder)
    pairs = list(checkpoint_weights(model, zero_stage=2))
    assert len(dict(pairs)) == len(pairs)
    _assert_same(dict(pairs), load_file(folder / "model.safetensors"), rtol=0, atol=0)
    names = {name for name, _ in model.named_parameters()}
    assert (names == dict(pairs).keys()) == (family == "qwen3_vl")  # elsewhere transformers renames


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tied_embeddings_come_once(family: str, tmp_path: Path) -> None:
    folder = build_tiny_model(family, tmp_path, tie_word_embeddings=True)
    names = [name for name, _ in checkpoint_weights(_load(folder), zero_stage=2)]
    assert sorted(names) == sorted(load_file(folder / "model.safetensors"))
    assert not any("lm_head" in name for name in names)


def test_small_buckets_change_nothing(tiny_folder: Callable[[str], Path]) -> None:
    model = _load(tiny_folder("qwen3_vl"))
    one = list(checkpoint_weights(model, 2, bucket_bytes=1))
    all_at_once = list(checkpoint_weights(model, 2))
    assert [name for name, _ in one] == [name for name, _ in all_at_once]


def _with_lora(folder: Path, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": r".*language_model.*(q_proj|down_proj)"} | options
    model = peft.get_peft_model(_load(folder), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_lora_is_merged_and_the_stored_base_untouched(
    family: str, options: dict[str, Any], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_folder(family)
    model = _with_lora(folder, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {name: tensor.clone() for name, tensor in checkpoint_weights(model, zero_stage=2)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    base = load_file(folder / "model.safetensors")
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path)
    _assert_same(found, load_file(tmp_path / "model.safetensors"), rtol=1e-6, atol=1e-6)
    assert any(not torch.allclose(found[name], base[name], atol=1e-3) for name in base)


def test_the_engine_gets_the_bits_that_are_exported(tiny_folder: Callable[[str], Path]) -> None:
    """In bf16, where it matters that B A is not rounded by itself."""
    model = load_model(ModelConfig(path=str(tiny_folder("qwen3_vl")), dtype="bfloat16", lora_rank=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=generator)
    exported = merged_state_dict(model)
    named = {name: exported[place] for place, name in checkpoint_names(model, exported).items()}
    found = dict(checkpoint_weights(model, zero_stage=0))
    assert all(torch.equal(tensor, named[name]) for name, tensor in found.items())
    place = "model.language_model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(place)
    low, high = (getattr(layer, f"lora_{part}")["default"].weight.double() for part in "AB")
    truth = layer.base_layer.weight.double() + layer.scaling["default"] * high @ low
    rounding = (exported[f"{place}.weight"].double() - truth).abs() / truth.abs()
    assert rounding.max() <= 2**-8  # half of a unit in the last place


def test_dora_is_refused(tiny_folder: Callable[[str], Path]) -> None:
    model = _with_lora(tiny_folder("qwen3_vl"), use_dora=True)
    with pytest.raises(UserError, match="plain LoRA"):
        list(checkpoint_weights(model, zero_stage=2))
