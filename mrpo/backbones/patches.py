"""The embedding of patches as the matrix product that it is.

The Qwens embed patches by a 3-D convolution over inputs of exactly the kernel's size. In bfloat16 cuDNN has no fast
kernels for that, and in some versions none for its backward pass (huggingface/transformers#45750, #45041).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import Conv3d
from torch.nn.functional import linear


def embed_patches_by_product(model: Any) -> None:
    """Makes the 3-D convolutions in `model` matrix products wherever an input is one patch, on GPUs."""
    for module in model.modules():
        if _is_plain(module):
            module.forward = MethodType(_forward, module)


def _is_plain(module: torch.nn.Module) -> bool:
    return type(module) is Conv3d and module.groups == 1 and not any(module.padding) and max(module.dilation) == 1


def _forward(self: Conv3d, patches: torch.Tensor) -> torch.Tensor:
    return _product(self, patches) if patches.is_cuda else Conv3d.forward(self, patches)


def _product(self: Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """(n, C, T, H, W) -> (n, D, 1, 1, 1) if the kernel is (T, H, W)."""
    if patches.shape[2:] != self.kernel_size:
        return Conv3d.forward(self, patches)
    return linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]
