"""Attention over packed rows: the prompt causally, every completion itself and its prompt.

Three ways to the same numbers. `sdpa`: a dense mask for each group of l tokens, l^2 scores, everywhere; in fp64 it is
what the others are tested against. `flex`: FlexAttention, which skips invisible tiles. `flash`: two variable-length
flash-attention calls, every part with itself and completions with their prompts, joined by their log-sum-exps. FLOPs of
`flex` and `flash`: 4 D Hq for each visible pair forward, 10 D Hq backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from .checks import check_tensor, require
from .prefix_flash import flash_prefix_attention, takes_flash
from .prefix_layout import PrefixLayout

__all__ = ["AttentionName", "PrefixLayout", "choose_attention", "compilations", "prefix_attention"]

AttentionName = Literal["sdpa", "flex", "flash"]

# FlexAttention is the only one of the two that has been timed inside a whole update, a prototype's before this code
# (H200, 8 B, 12,800 completion tokens: 2.15 s, 9 % of it attention).
ON_GPU: AttentionName = "flex"


def prefix_attention(
    q: torch.Tensor,  # [1, Hq, L, D]
    k: torch.Tensor,  # [1, Hkv, L, D]
    v: torch.Tensor,  # [1, Hkv, L, D]
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    implementation: AttentionName | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T, over the keys that `layout` lets a query see) v, [1, Hq, L, D]; differentiable once.

    Args:
        q, k, v: one floating dtype; Hq is a multiple of Hkv.
        layout: of L tokens, on the same device.
        scale: default: 1 / sqrt(D).
        implementation: default: what `choose_attention` says. "flash" takes bfloat16 and float16 on a GPU.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device; the message names it.
    """
    check_tensor("q", q, (1, *q.shape[1:]), layout.device)
    require(q.dim() == 4, f"q must have shape (1, Hq, L, D), not {tuple(q.shape)}")
    heads, length, head_dim = q.shape[1:]
    require(length == layout.length, f"q has {length} tokens, its layout {layout.length}")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (1, *tensor.shape[1:2], length, head_dim), layout.device, q.dtype)
    require(
        k.shape == v.shape and heads % k.shape[1] == 0, f"{heads} query heads cannot share {k.shape[1]} key-value heads"
    )
    name = implementation or choose_attention(q.device, head_dim, q.dtype)
    require(name in _IMPLEMENTATIONS, f"implementation must be one of {', '.join(_IMPLEMENTATIONS)}, not {name!r}")
    return _IMPLEMENTATIONS[name](q, k, v, layout, head_dim**-0.5 if scale is None else scale)


def choose_attention(device: torch.device, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> AttentionName:
    """The fastest implementation that serves queries of this kind."""
    if device.type != "cuda" or find_spec("triton") is None or dtype == torch.float64:
        return "sdpa"
    return "flex" if ON_GPU == "flash" and not takes_flash(device, head_dim, dtype) else ON_GPU


def compilations() -> int:
    """How many graphs torch.compile has compiled in this process, those of FlexAttention among them."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes seconds, and who has not has compiled nothing
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


def flex_prefix_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float) -> torch.Tensor:
    """FlexAttention under a layout's block mask; inside a compiled function it becomes part of its graph."""
    alone = q.device.type == "cuda" and not torch.compiler.is_compiling()
    run: Any = _compiled_flex_attention() if alone else flex_attention
    return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Any]:
    """Compiled once for all lengths. On the CPU it is not compiled: there it has no backward pass anyway."""
    return torch.compile(flex_attention, dynamic=True)


GroupMasks = tuple[tuple[slice, torch.Tensor], ...]


def sdpa_prefix_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: GroupMasks, scale: float
) -> torch.Tensor:
    """SDPA under a layout's `group_masks`, group by group: a mask of the whole row would make L^2 scores."""
    outputs = [
        scaled_dot_product_attention(
            q[:, :, place],
            k[:, :, place],
            v[:, :, place],
            attn_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        for place, mask in masks
    ]
    return torch.cat(outputs, dim=2)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PrefixLayout, scale: float) -> torch.Tensor:
    return sdpa_prefix_attention(q, k, v, layout.group_masks, scale)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PrefixLayout, scale: float) -> torch.Tensor:
    return flex_prefix_attention(q, k, v, layout.block_mask(), scale)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: PrefixLayout, scale: float) -> torch.Tensor:
    return flash_prefix_attention(q, k, v, layout.flash_spans, scale)


_IMPLEMENTATIONS: dict[str, Callable[[Any, Any, Any, PrefixLayout, float], torch.Tensor]] = {
    "sdpa": _sdpa,
    "flex": _flex,
    "flash": _flash,
}
