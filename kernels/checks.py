"""Argument checks whose errors name the argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_on_devices: ContextVar[bool] = ContextVar("values_checked_on_devices", default=False)


@contextmanager
def check_values() -> Iterator[None]:
    """Within this context the values of tensors on devices are checked too, which waits for the device.

    Targets outside the vocabulary, NaN, segments that do not ascend: on the CPU they are always refused.
    """
    token = _on_devices.set(True)
    try:
        yield
    finally:
        _on_devices.reset(token)


def values_are_checked(device: torch.device) -> bool:
    """Whether to look at the values of tensors on this device."""
    return device.type == "cpu" or (_on_devices.get() and device.type != "meta")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Refuse a tensor of another shape, device or dtype (`None`: any floating dtype).

    Raises:
        TypeError: it is no tensor, or its dtype is another.
        ValueError: its shape or device is another.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if dtype is None and not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, not {tensor.dtype}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, not {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not on {tensor.device}")


def check_targets(targets: torch.Tensor, vocab: int, used: torch.Tensor | None = None) -> None:
    """Refuse targets outside [0, vocab), where they are `used` (None: everywhere). Waits for the device.

    Raises:
        ValueError: names the first one.
    """
    wrong = (targets < 0) | (targets >= vocab)
    wrong = wrong if used is None else wrong & used
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {vocab})")


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)
