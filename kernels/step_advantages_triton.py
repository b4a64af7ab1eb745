"""The step-wise shaping in Triton, one kernel for tokens and for segments.

Bytes and meaning: `step_advantages`. Weights are computed in fp64, as in the reference: there are few of them, and
rounding to two decimals must fall on the same side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .reference import StepPenalty, step_weights

_BLOCK = 512
_ROUNDER = tl.constexpr(6755399441055744.0)  # 1.5 * 2^52: adding it to fp64 leaves an integer, rounded half to even


@triton.jit
def _to(x, dtype: tl.constexpr):
    """Between half precision and fp64 by way of fp32, as PyTorch does it."""
    half: tl.constexpr = dtype.primitive_bitwidth == 16 or x.dtype.primitive_bitwidth == 16
    return (x.to(tl.float32) if half else x).to(dtype)


@triton.jit
def _shape_kernel(
    advantages,  # [B]
    answer_correct,  # [B] bool
    step_valid,  # [B, K] bool
    num_steps,  # [B] int64
    completions,  # [count] int64, or None: element n belongs to completion n // tokens_per_completion
    step_ids,  # [count] int64
    weights,  # [B, K] fp64, or None: by formula
    out,  # [count]
    count,
    tokens_per_completion,
    max_steps,
    PENALTY: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    if completions is None:
        completion = element // tokens_per_completion
    else:
        completion = tl.load(completions + element, mask=inside, other=0)
    step = tl.load(step_ids + element, mask=inside, other=-1)
    plain = tl.load(advantages + completion, mask=inside, other=0.0)
    steps = tl.load(num_steps + completion, mask=inside, other=0)
    correct = tl.load(answer_correct + completion, mask=inside, other=True)
    judged = (step >= 0) & (step < steps) & ~correct
    place = completion * max_steps + step
    valid = tl.load(step_valid + place, mask=judged, other=True)
    if weights is None:
        span = tl.where(steps > 1, steps - 1, 1).to(tl.float64)
        passed = steps - 1 - step if PENALTY == "reversed" else step
        lateness = tl.where(steps > 1, passed.to(tl.float64) / span, 1.0)
        if PENALTY == "exponential" or PENALTY == "reversed":
            weight = tl.exp(1.0 - lateness)
        elif PENALTY == "linear":
            weight = 2.0 - lateness
        else:
            weight = lateness * 0.0 + 1.0
    else:
        weight = tl.load(weights + place, mask=judged, other=1.0)
    if ROUND:
        weight = ((weight * 100.0 + _ROUNDER) - _ROUNDER) / 100.0
    # The weight is rounded to the dtype of the advantages before the product, as in the reference.
    shaped = _to(_to(tl.where(valid, 1.0, -weight), plain.dtype), tl.float64) * tl.abs(_to(plain, tl.float64))
    tl.store(out + element, tl.where(judged, _to(shaped, plain.dtype), plain), mask=inside)


def shaped_advantages_triton(
    advantages: torch.Tensor,  # [B]
    answer_correct: torch.Tensor,  # [B] bool
    step_valid: torch.Tensor,  # [B, K] bool
    num_steps: torch.Tensor,  # [B] int64
    completions: torch.Tensor | None,  # like step_ids; None: of [B, T] step_ids each row is one
    step_ids: torch.Tensor,  # int64
    *,
    penalty: str | StepPenalty | torch.Tensor,
    round_weights: bool,
) -> torch.Tensor:
    """As `reference.shaped_advantages`, on a CUDA device or interpreted; [shape of step_ids]."""
    max_steps = step_valid.shape[1]
    out = torch.empty(step_ids.shape, dtype=advantages.dtype, device=advantages.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(advantages):
        _shape_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
            advantages.contiguous(),
            answer_correct.contiguous(),
            step_valid.contiguous(),
            num_steps.contiguous(),
            None if completions is None else completions.contiguous(),
            step_ids.contiguous(),
            None if isinstance(penalty, str) else step_weights(penalty, num_steps, max_steps).contiguous(),
            out,
            out.numel(),
            step_ids.shape[-1],
            max_steps,
            PENALTY=penalty if isinstance(penalty, str) else "table",
            ROUND=round_weights,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,  # weight * 100 is rounded before the rounder is added, as in the reference
        )
    return out
