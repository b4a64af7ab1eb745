"""Low-rank adapters in place of weights (LoRA, Hu et al. 2021, arXiv 2106.09685), through the peft package.

A linear layer computes W x + (alpha / r) B A x with W frozen. Layers are exchanged where they stand, so that paths of
modules stay; the layer's own weight moves to `.base_layer`. The head is never adapted: its loss needs the raw weight.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mrpo.config import ModelConfig
from mrpo.errors import UserError

ADAPTER_FILE = "adapter_model.safetensors"


def add_adapters(model: Any, config: ModelConfig, vision_modules: Sequence[str]) -> None:
    """Freezes `model` and puts trainable adapters into it: into the language model and, if asked, the vision tower.

    B starts at 0, so the policy starts as it was; A is drawn from PyTorch's global generator.

    Raises:
        UserError: peft is not installed, or a target is no linear layer of the model.
    """
    require_peft(config)
    from peft import LoraConfig, inject_adapter_in_model

    towers = ("language_model", *(vision_modules if config.lora_vision else ()))
    places = {place for tower in towers for place in _linear_places(model, f"model.{tower}")}
    names = {_name(place) for place in places}
    chosen = names if config.lora_targets is None else set(config.lora_targets)
    if unknown := sorted(chosen - names):
        raise UserError(
            f"model.lora_targets={unknown[0]} is no linear layer of the model's {', '.join(towers)}; there are: "
            f"{', '.join(sorted(names))}"
        )
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft only divides it by r
        target_modules="|".join(sorted({_pattern(place) for place in places if _name(place) in chosen})),
        base_model_name_or_path=config.path,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(adapter, model)


def require_peft(config: ModelConfig) -> None:
    """Checks that adapters can be made if `config` asks for them.

    Raises:
        UserError: peft is not installed.
    """
    if config.lora_rank and find_spec("peft") is None:
        raise UserError(f"model.lora_rank={config.lora_rank} needs the peft package: pip install 'mrpo[lora]'")


def has_adapters(model: Any) -> bool:
    """Whether `add_adapters` has been there."""
    return any(True for _ in _adapted_layers(model))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """A context in which `model` is the policy that training started from: a reference that costs no memory."""
    layers = [layer for _, layer in _adapted_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of the same model without adapters, each W + (alpha / r) B A rounded once; others not copied."""
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in _adapted_layers(model):
        state[f"{name}.weight"] = merged_weight(layer)
    return state


@torch.no_grad()
def merged_weight(layer: Any) -> torch.Tensor:
    """The weight of a layer of peft's with its active adapters added in float32, rounded once, in its own dtype."""
    weight = layer.base_layer.weight
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for name in filter(layer.scaling.__contains__, layer.active_adapters):
        if isinstance(layer.base_layer, nn.Linear):
            low, high = layer.lora_A[name].weight.to(merged.dtype), layer.lora_B[name].weight.to(merged.dtype)
            merged = torch.addmm(merged, high, low, alpha=layer.scaling[name])
        else:  # peft multiplies in the adapters' own dtype
            merged = merged + layer.get_delta_weight(name)
    return merged.to(weight.dtype)


def save_adapters(model: Any, folder: Path | str) -> None:
    """Writes the adapters alone in peft's format: `PeftModel.from_pretrained(base, folder)` reads them."""
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapters = get_peft_model_state_dict(model)
    # A PeftModel wraps the model twice.
    named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in adapters.items()}
    save_file(named, folder / ADAPTER_FILE, metadata={"format": "pt"})
    about = copy.copy(model.peft_config["default"])
    about.inference_mode = True
    about.save_pretrained(str(folder))


def _linear_places(model: Any, tower: str) -> Iterator[str]:
    """The paths of the linear layers in a tower."""
    for name, module in model.get_submodule(tower).named_modules(prefix=tower):
        if type(module) is nn.Linear:
            yield name


def _name(place: str) -> str:
    """`q_proj`; of a layer that has but a number, what holds it, too: `mlp.0`."""
    *_, above, last = place.split(".")
    return f"{above}.{last}" if last.isdecimal() else last


def _pattern(place: str) -> str:
    """A regular expression for the same layer at every depth: one text instead of hundreds of paths."""
    return re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(place))


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module
