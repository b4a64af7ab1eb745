"""From main memory to a device without waiting for it."""

from __future__ import annotations

import torch


def send(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor` on `device` in `dtype` (default: its own).

    A GPU takes it from pinned memory when its turn comes: the host, which makes the next pass meanwhile, need not wait
    until the device has finished what it was given before.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)
