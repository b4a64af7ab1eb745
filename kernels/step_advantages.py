"""Step-wise shaping: from one advantage per completion to one per token, or per segment of tokens.

Bytes for B completions of T tokens, K steps at most: 8BT of step numbers read, sBT of advantages of s bytes written,
and B(K + 18) beside them; nothing of the size of the tokens for segments.
"""

from __future__ import annotations

import torch

from . import reference
from .checks import check_tensor, require, values_are_checked
from .dispatch import implementation_of
from .records import SegmentedAdvantages
from .reference import PENALTIES, StepPenalty


def step_advantages(
    advantages: torch.Tensor,  # [B]
    answer_correct: torch.Tensor,  # [B] bool
    step_ids: torch.Tensor,  # [B, T] int64
    step_valid: torch.Tensor,  # [B, K] bool
    num_steps: torch.Tensor,  # [B] int64
    *,
    penalty: str | StepPenalty | torch.Tensor = "exponential",
    round_weights: bool = False,
) -> torch.Tensor:  # [B, T]
    """MRPO's per-token advantages (arXiv 2606.31825).

    A completion with a correct answer, or that was not judged, keeps its advantage A at every token. Otherwise a token
    of a valid step gets +|A| and a token of invalid step k of K gets -w(k, K) |A|; a token outside every judged step
    keeps A. The exponential weight is exp(1 - (k-1)/(K-1)), from e at the first step to 1 at the last (K = 1: 1).

    Args:
        advantages: A, any floating dtype; the result has the same.
        answer_correct: the answer reward is above tau.
        step_ids: 0-based step of each completion token, -1 outside every step. A step that the judge did not
            return (step id >= num_steps) counts as outside.
        step_valid: the verdict on each step, padded to the longest completion.
        num_steps: K, the number of judged steps of each completion; 0: not judged.
        penalty: w as "exponential", "linear" (from 2 to 1), "none" (1 at every step), "reversed" (the exponential
            weight of step K + 1 - k, an ablation); a table of weights, [K_max] by k or [K_max, K_max] by K and k, both
            counted from 1; or a function of the int64 tensors k [1, K], 1-based, and num_steps [B, 1] that gives
            weights [B, K].
        round_weights: round w to two decimals, as the paper's code does.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value; the message names it. Values of
            tensors are checked on the CPU, where reading them does not wait for a device, and within
            `checks.check_values`.
        RuntimeError: `dispatch.use` forces an implementation that cannot run here.
    """
    require(step_ids.dim() == 2, f"step_ids must have shape (B, T), not {tuple(step_ids.shape)}")
    check_tensor("step_ids", step_ids, tuple(step_ids.shape), step_ids.device, torch.int64)
    if values_are_checked(step_ids.device):
        require(bool((step_ids >= -1).all()), "step_ids must be -1 (outside every step) or a step's 0-based number")
    _check_steps(advantages, answer_correct, step_valid, num_steps, step_ids.shape[0], step_ids.device)
    return _shaped(advantages, answer_correct, step_valid, num_steps, None, step_ids, penalty, round_weights)


def segment_advantages(
    advantages: torch.Tensor,  # [B]
    answer_correct: torch.Tensor,  # [B] bool
    step_valid: torch.Tensor,  # [B, K] bool
    num_steps: torch.Tensor,  # [B] int64
    spans: torch.Tensor,  # [S, 3] int64
    *,
    penalty: str | StepPenalty | torch.Tensor = "exponential",
    round_weights: bool = False,
) -> SegmentedAdvantages:
    """The same advantages, one per segment of the flat list of all completions' tokens.

    Args:
        spans: completion, 0-based step (-1: outside every step) and end of each segment in the flat list, in the order
            of the ends; a segment begins where the one before it ends.
        The others: as `step_advantages` has them.

    Raises:
        As `step_advantages`.
    """
    require(spans.dim() == 2, f"spans must have shape (S, 3), not {tuple(spans.shape)}")
    check_tensor("spans", spans, (spans.shape[0], 3), spans.device, torch.int64)
    completions, step_ids, ends = spans.unbind(1)
    batch = advantages.shape[0]
    if values_are_checked(spans.device):
        known = (completions >= 0) & (completions < batch)
        require(bool(known.all()), f"spans name a completion outside [0, {batch})")
        require(bool((step_ids >= -1).all()), "spans must name a step by -1 (outside every step) or its 0-based number")
        require(bool((ends.diff(prepend=ends.new_zeros(1)) >= 0).all()), "the ends of spans must ascend from 0")
    _check_steps(advantages, answer_correct, step_valid, num_steps, batch, spans.device)
    values = _shaped(advantages, answer_correct, step_valid, num_steps, completions, step_ids, penalty, round_weights)
    return SegmentedAdvantages(ends.contiguous(), values)


def _shaped(
    advantages: torch.Tensor,
    answer_correct: torch.Tensor,
    step_valid: torch.Tensor,
    num_steps: torch.Tensor,
    completions: torch.Tensor | None,
    step_ids: torch.Tensor,
    penalty: str | StepPenalty | torch.Tensor,
    round_weights: bool,
) -> torch.Tensor:
    _check_penalty(penalty, step_valid)
    arguments = (advantages, answer_correct, step_valid, num_steps, completions, step_ids)
    if implementation_of("step_advantages", advantages.device, advantages.dtype) == "triton":
        from .step_advantages_triton import shaped_advantages_triton

        return shaped_advantages_triton(*arguments, penalty=penalty, round_weights=round_weights)
    formula = PENALTIES[penalty] if isinstance(penalty, str) else penalty
    return reference.shaped_advantages(*arguments, penalty=formula, round_weights=round_weights)


def _check_steps(
    advantages: torch.Tensor,
    answer_correct: torch.Tensor,
    step_valid: torch.Tensor,
    num_steps: torch.Tensor,
    batch: int,
    device: torch.device,
) -> None:
    require(step_valid.dim() == 2, f"step_valid must have shape (B, K), not {tuple(step_valid.shape)}")
    max_steps = step_valid.shape[1]
    check_tensor("advantages", advantages, (batch,), device)
    check_tensor("answer_correct", answer_correct, (batch,), device, torch.bool)
    check_tensor("step_valid", step_valid, (batch, max_steps), device, torch.bool)
    check_tensor("num_steps", num_steps, (batch,), device, torch.int64)
    if values_are_checked(device):
        in_range = (num_steps >= 0) & (num_steps <= max_steps)
        require(bool(in_range.all()), f"num_steps must be in [0, {max_steps}], the steps of step_valid")


def _check_penalty(penalty: str | StepPenalty | torch.Tensor, step_valid: torch.Tensor) -> None:
    if isinstance(penalty, str):
        known = f"a table, a function or one of {sorted(PENALTIES)}"
        require(penalty in PENALTIES, f"penalty must be {known}, not {penalty!r}")
    elif isinstance(penalty, torch.Tensor):
        size, max_steps = max(penalty.shape, default=0), step_valid.shape[1]
        require(
            penalty.dim() in (1, 2) and size >= max_steps,
            f"penalty must be a table of shape (K_max,) or (K_max, K_max), K_max >= {max_steps}, "
            f"not {tuple(penalty.shape)}",
        )
        check_tensor("penalty", penalty, (size,) * penalty.dim(), step_valid.device)
