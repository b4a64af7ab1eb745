"""The joining of two attention outputs by their log-sum-exps in Triton: one pass instead of five.

out = own + share (prefix - own), share = exp(prefix_lse - lse), lse = logaddexp(own_lse, prefix_lse); tokens without a
prefix are left alone, their half of `prefix` is not read. In place: `own` becomes the output. Bytes for L tokens with a
prefix, Hq heads of size D in bf16: 4 L Hq D read and 2 L Hq D written; the log-sum-exps are D / 4 times less.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _join_kernel(
    own,  # [L, Hq, D], becomes the joined output
    prefix,  # [L, Hq, D]
    own_lse,  # [Hq, L], becomes the joined log-sum-exp
    prefix_lse,  # [Hq, L]
    has_prefix,  # [L] bool
    length,
    heads,
    head_dim,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if tl.load(has_prefix + token):
        head = tl.arange(0, HEADS)
        lse_at, real = head * length + token, head < heads
        first = tl.load(own_lse + lse_at, mask=real, other=0.0)
        second = tl.load(prefix_lse + lse_at, mask=real, other=0.0)
        larger = tl.maximum(first, second)
        lse = larger + tl.log(tl.exp(first - larger) + tl.exp(second - larger))
        tl.store(own_lse + lse_at, lse, mask=real)

        column = tl.arange(0, HEAD_DIM)[None, :]
        at = (token * heads + head[:, None]) * head_dim + column
        inside = real[:, None] & (column < head_dim)
        a = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(prefix + at, mask=inside, other=0.0).to(tl.float32)
        joined = a + tl.exp(second - lse)[:, None] * (b - a)
        tl.store(own + at, joined.to(own.dtype.element_ty), mask=inside)


def join_in_place(
    own: torch.Tensor,  # [L, Hq, D], contiguous
    own_lse: torch.Tensor,  # [Hq, L] fp32, contiguous
    prefix: torch.Tensor,  # [L, Hq, D], contiguous
    prefix_lse: torch.Tensor,  # [Hq, L] fp32, contiguous
    has_prefix: torch.Tensor,  # [L] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`own` and `own_lse`, joined with the others."""
    length, heads, head_dim = own.shape
    with torch.cuda.device_of(own):
        _join_kernel[(length,)](
            own,
            prefix,
            own_lse,
            prefix_lse,
            has_prefix,
            length,
            heads,
            head_dim,
            HEADS=triton.next_power_of_2(heads),
            HEAD_DIM=triton.next_power_of_2(head_dim),
        )
    return own, own_lse
