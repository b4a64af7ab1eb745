"""The reference policy of the KL term: the start policy, frozen.

With adapters it is the policy itself without them, and costs nothing. Else it is a copy: whole on every process, if
asked in host memory between its uses, or sharded like the policy under ZeRO-3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import deepspeed
import torch
from torch import nn

from mrpo.backbones.lora import has_adapters, without_adapters
from mrpo.config import Config
from mrpo.deepspeed_config import reference_config

# Opens the module that says the reference's log-probabilities.
Reference: TypeAlias = Callable[[], AbstractContextManager[Any]]


def copy_reference(module: nn.Module, config: Config, device: torch.device) -> Reference:
    """The reference of a policy `module` that trains all its weights; to be made before DeepSpeed takes it."""
    frozen = copy.deepcopy(module).requires_grad_(False).eval()
    if config.deepspeed.zero_stage == 3:
        engine, *_ = deepspeed.initialize(model=frozen, config=reference_config(config))
        return lambda: _open(engine)
    if config.loss.reference_offload and device.type != "cpu":
        return lambda: _on_device(frozen, device)
    frozen.to(device)
    return lambda: _open(frozen)


def adapter_reference(engine: Any, model: nn.Module) -> Reference:
    """The reference of a policy that trains adapters of `model`: the same engine without them."""
    assert has_adapters(model)
    return lambda: _without_adapters(engine, model)


@contextmanager
def _open(module: Any) -> Iterator[Any]:
    yield module


@contextmanager
def _without_adapters(engine: Any, model: nn.Module) -> Iterator[Any]:
    with without_adapters(model):
        yield engine


@contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[Any]:
    """`module` with its tensors on `device`, whose host copies stay where they are: nothing is brought back."""
    tensors = [*module.parameters(), *module.buffers()]
    host = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    try:
        yield module
    finally:
        for tensor, data in zip(tensors, host, strict=True):
            tensor.data = data
