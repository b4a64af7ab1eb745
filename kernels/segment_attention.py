"""Attention of stretches of tokens with all of themselves: the images of a batch, or the windows of an image.

One variable-length flash-attention call where that runs, else one SDPA call for each length that occurs: a loop over
stretches would launch several kernels for each. FLOPs: 4 D Hq for each pair of tokens of a stretch forward, 10 D Hq
backward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import scaled_dot_product_attention

from .checks import check_tensor, require
from .prefix_flash import joined_attention, takes_flash


def segment_attention(
    q: torch.Tensor,  # [T, Hq, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    starts: torch.Tensor,  # [S + 1] int32
    longest: int | None = None,
    *,
    scale: float | None = None,
    implementation: Literal["sdpa", "flash"] | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T, over the keys of a query's own stretch) v, [T, Hq, D]; differentiable once.

    Args:
        q, k, v: one floating dtype; Hq is a multiple of Hkv.
        starts: where each of the S stretches begins, and T; a stretch may be empty.
        longest: the longest stretch; default: read from `starts`, which waits for the device.
        scale: default: 1 / sqrt(D).
        implementation: default: "flash" for bfloat16 and float16 on a GPU (of sm_80 or later), else "sdpa", which reads
            `starts` if lengths differ.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape or device; the message names it.
    """
    require(q.dim() == 3 and len(q) > 0, f"q must have shape (T, Hq, D) with T > 0, not {tuple(q.shape)}")
    tokens, heads, head_dim = q.shape
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, (tokens, *tensor.shape[1:2], head_dim), q.device, q.dtype)
    require(
        k.shape == v.shape and heads % k.shape[1] == 0, f"{heads} query heads cannot share {k.shape[1]} key-value heads"
    )
    check_tensor("starts", starts, (*starts.shape[:1],), q.device, torch.int32)
    scale = head_dim**-0.5 if scale is None else scale
    name = implementation or ("flash" if takes_flash(q.device, head_dim, q.dtype) else "sdpa")
    longest = int(starts.diff().max()) if longest is None else longest
    return attend_segments(q, k, v, starts, longest, scale, flash=name == "flash")


def attend_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float, *, flash: bool
) -> torch.Tensor:
    """`segment_attention` without checks, which a compiler would take for reasons to compile anew."""
    if not flash:
        return _by_length(q, k, v, starts, longest, scale)
    none = starts.new_empty(0)
    return joined_attention(q, k, v, starts, none, none, none, (longest, 0, 0), False, scale)[0]


@torch.compiler.disable  # new lengths would be new graphs
def _by_length(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    if (len(starts) - 1) * longest == len(q):
        return _of_one_length(q, k, v, longest, scale)
    sizes = starts.diff().long()
    length_of = sizes.repeat_interleave(sizes)  # of the stretch that a token belongs to
    require(len(length_of) == len(q), f"starts must end at {len(q)}, the number of tokens, not at {len(length_of)}")
    lengths = length_of.unique().tolist()
    places = [(length_of == length).nonzero()[:, 0] for length in lengths]
    outputs = []
    for length, place in zip(lengths, places, strict=True):
        own_q, own_k, own_v = (tensor.index_select(0, place) for tensor in (q, k, v))
        outputs.append(_of_one_length(own_q, own_k, own_v, length, scale))
    return torch.cat(outputs).index_select(0, torch.cat(places).argsort())


def _of_one_length(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    q, k, v = (tensor.unflatten(0, (-1, length)).transpose(1, 2) for tensor in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)
