from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY_FAMILIES
from transformers import AutoModelForImageTextToText

from mrpo.backbones import load_model, lora
from mrpo.config import ModelConfig
from mrpo.errors import UserError

pytest.importorskip("peft")


def load(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return load_model(ModelConfig(path=str(folder), **options))


@torch.no_grad()
def randomize(model: Any) -> None:
    """Adapters that change something: B is 0 at first."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(0.0, 0.2, generator=generator)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 13).reshape(2, 6)
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_only_adapters_train_and_they_start_as_nothing(family: str, tiny_folder: Callable[[str], Path]) -> None:
    plain, adapted = load(tiny_folder(family)), load(tiny_folder(family), lora_rank=4)
    assert torch.equal(logits(adapted), logits(plain))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name and name.startswith("model.language_model.layers.") for name in trained)
    layers = [name for name, module in plain.model.language_model.named_modules() if type(module) is torch.nn.Linear]
    assert len(trained) == 2 * len(layers)
    assert all(type(adapted.get_submodule(f"model.language_model.{name}")).__name__ == "Linear" for name in layers)
    assert type(adapted.lm_head) is torch.nn.Linear
    logits(adapted).square().sum().backward()
    assert all(parameter.grad is None for name, parameter in adapted.named_parameters() if name not in trained)
    assert any(adapted.get_parameter(name).grad.abs().max() > 0 for name in trained)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_merged_weights_are_an_ordinary_model(family: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    adapted = load(tiny_folder(family), lora_rank=4, lora_alpha=6.0, lora_vision=True)
    randomize(adapted)
    adapted.save_pretrained(tmp_path, state_dict=lora.merged_state_dict(adapted))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    original = load(tiny_folder(family))
    assert merged.state_dict().keys() == original.state_dict().keys()
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(original) - logits(merged)).abs().max() > 0.1
    name = "model.language_model.layers.1.mlp.up_proj"
    low = adapted.get_parameter(f"{name}.lora_A.default.weight").double()
    high = adapted.get_parameter(f"{name}.lora_B.default.weight").double()
    truth = original.get_parameter(f"{name}.weight").double() + 6.0 / 4 * high @ low
    torch.testing.assert_close(merged.get_parameter(f"{name}.weight").double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_saved_adapters_are_read_by_peft(family: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import PeftModel

    adapted = load(tiny_folder(family), lora_rank=2, lora_vision=True)
    randomize(adapted)
    lora.save_adapters(adapted, tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tiny_folder(family))
    assert (about["peft_type"], about["r"], about["inference_mode"]) == ("LORA", 2, True)
    read = PeftModel.from_pretrained(load(tiny_folder(family)), str(tmp_path))
    torch.testing.assert_close(logits(read), logits(adapted), rtol=1e-5, atol=1e-5)


def test_without_adapters_it_is_the_start_policy_and_they_come_back(tiny_folder: Callable[[str], Path]) -> None:
    start = logits(load(tiny_folder("qwen3_vl")))
    adapted = load(tiny_folder("qwen3_vl"), lora_rank=4)
    randomize(adapted)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    changed = logits(adapted)
    with lora.without_adapters(adapted):
        assert torch.equal(logits(adapted), start)
    assert torch.equal(logits(adapted), changed)
    with pytest.raises(TypeError), lora.without_adapters(adapted):
        adapted("not ids")
    assert torch.equal(logits(adapted), changed)
    assert not torch.equal(changed, start)
    assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_targets_and_vision(family: str, tiny_folder: Callable[[str], Path]) -> None:
    few = load(tiny_folder(family), lora_rank=2, lora_targets=("q_proj", "down_proj"))
    names = {name for name, _ in few.named_parameters() if ".lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "down_proj"}
    assert all(name.startswith("model.language_model.") for name in names)
    seen = load(tiny_folder(family), lora_rank=2, lora_vision=True)
    towers = {name.split(".")[1] for name, _ in seen.named_parameters() if ".lora_" in name}
    expected = {"vision_tower", "multi_modal_projector"} if family == "internvl" else {"visual"}
    assert towers == {"language_model", *expected}


def test_an_unknown_target_is_named(tiny_folder: Callable[[str], Path]) -> None:
    with pytest.raises(
        UserError, match=r"model\.lora_targets=w_proj is no linear layer .* down_proj, gate_proj, k_proj"
    ):
        load(tiny_folder("qwen3_vl"), lora_rank=2, lora_targets=("w_proj", "q_proj"))


def test_without_peft_the_error_says_what_to_install(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model.lora_rank=2 needs the peft package: pip install 'mrpo\[lora\]'"):
        load(tiny_folder("qwen3_vl"), lora_rank=2)
