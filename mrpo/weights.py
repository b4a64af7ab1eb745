"""The trained weights as a checkpoint of the model would hold them, one whole tensor after the other.

An engine with weights of its own loads them under the names of the checkpoint, which transformers may have renamed in
memory, and knows neither shards nor adapters: those are put together here, a bucket at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from mrpo.backbones.lora import merged_weight
from mrpo.errors import UserError

BUCKET_BYTES = 1 << 29
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class _Weight:
    """One tensor of the checkpoint: a parameter and, if a LoRA layer wraps it, that layer."""

    name: str
    parameter: nn.Parameter
    adapter: Any = None

    @property
    def needed(self) -> list[nn.Parameter]:
        """The parameters that must be whole to read this weight."""
        own = self.adapter.named_parameters() if self.adapter is not None else ()
        return [self.parameter, *(p for name, p in own if not name.startswith("base_layer."))]

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The tensor, merged with its adapters in float32; the stored one is never touched."""
        if self.adapter is None or self.adapter.disable_adapters or self.adapter.merged:
            return self.parameter.detach()
        return merged_weight(self.adapter)


def checkpoint_weights(
    model: Any, zero_stage: int, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight of `model` in a fixed order: what `save_pretrained` would write.

    Names are those of the checkpoint, tensors are whole and on the model's device, LoRA is merged into its base and
    tied weights come once. Under ZeRO-3 buckets of `bucket_bytes` are gathered in turn, so every process must iterate
    to the end; there the tensors are copies, which stay valid when their bucket is given back.

    Raises:
        UserError: an adapter is of a kind that cannot be merged here (DoRA).
    """
    for bucket in _buckets(_weights(model), bucket_bytes):
        parameters = list({id(p): p for weight in bucket for p in weight.needed}.values())
        with _gathered(parameters, zero_stage):
            for weight in bucket:
                tensor = weight.read()
                yield weight.name, tensor.clone() if zero_stage == 3 else tensor


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """From the name of each parameter in memory to its name in the checkpoint, by transformers' own mapping.

    Raises:
        RuntimeError: the checkpoint does not hold that parameter as it is (some architectures split or fuse them).
    """
    marks = {name: torch.empty(0, device="meta") for name in names}
    reverted = {id(mark): name for name, mark in revert_weight_conversion(model, dict(marks)).items()}
    lost = [name for name, mark in marks.items() if id(mark) not in reverted]
    if lost:
        raise RuntimeError(f"{type(model).__name__}: {lost[0]} is stored in another shape than it has in memory")
    return {name: reverted[id(mark)] for name, mark in marks.items()}


def _weights(model: Any) -> list[_Weight]:
    adapters = {path: module for path, module in model.named_modules() if _is_lora(module)}
    kept = {path: module for path, module in model.named_modules() if hasattr(module, "original_module")}
    found: dict[str, _Weight] = {}
    for path, parameter in model.named_parameters():
        name = _plain_name(path, adapters, kept)
        if name is None:
            continue
        layer, _, leaf = path.rpartition(".base_layer.")
        found[name] = _Weight(name, parameter, adapters[layer] if leaf == "weight" and layer in adapters else None)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = checkpoint_names(base, found)
    return [_Weight(names[name], weight.parameter, weight.adapter) for name, weight in found.items()]


def _plain_name(path: str, adapters: dict[str, Any], kept: dict[str, Any]) -> str | None:
    """The name of a parameter in the model without adapters; None for what belongs to an adapter alone."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        owner, rest = ".".join(parts[:end]), parts[end:]
        if owner in adapters and rest[0] != "base_layer":
            return None
        if owner in kept:
            if rest[0] != "modules_to_save" or rest[1] not in kept[owner].active_adapters:
                return None
            path = f"{owner}.{'.'.join(rest[2:])}"
    return path.replace(".base_layer.", ".").removeprefix(_PEFT_PREFIX)


def _is_lora(module: nn.Module) -> bool:
    if not (hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")):
        return False
    if len(getattr(module, "lora_magnitude_vector", ())):
        raise UserError("the engine cannot take the weights of DoRA adapters; train with plain LoRA")
    return True


def _buckets(weights: Iterable[_Weight], limit: int) -> Iterator[list[_Weight]]:
    """Consecutive weights of at most `limit` bytes together (one weight at least)."""
    bucket: list[_Weight] = []
    size = 0
    for weight in weights:
        count = getattr(weight.parameter, "ds_numel", weight.parameter.numel()) * weight.parameter.element_size()
        if bucket and size + count > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += count
    if bucket:
        yield bucket


def _gathered(parameters: list[nn.Parameter], zero_stage: int) -> AbstractContextManager[None]:
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
