"""Step-wise shaping: from one advantage per completion to one per token."""

from __future__ import annotations

import torch

from . import reference
from .checks import check_tensor, require
from .reference import PENALTIES, StepPenalty


def step_advantages(
    advantages: torch.Tensor,  # [B]
    answer_correct: torch.Tensor,  # [B] bool
    step_ids: torch.Tensor,  # [B, T] int64
    step_valid: torch.Tensor,  # [B, K] bool
    num_steps: torch.Tensor,  # [B] int64
    *,
    penalty: str | StepPenalty = "exponential",
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
        step_valid: the judge's word on each step, padded to the longest completion.
        num_steps: K, the number of judged steps of each completion; 0: not judged.
        penalty: w as "exponential", "linear" (from 2 to 1), "none" (1 at every step), or a function of the int64
            tensors k [1, K], 1-based, and num_steps [B, 1] that gives weights [B, K].
        round_weights: round w to two decimals, as the paper's code does.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value; the message names it. Values of
            tensors are checked on the CPU only, where reading them does not wait for a device.
    """
    _check(advantages, answer_correct, step_ids, step_valid, num_steps)
    if isinstance(penalty, str):
        require(penalty in PENALTIES, f"penalty must be a function or one of {sorted(PENALTIES)}, not {penalty!r}")
        penalty = PENALTIES[penalty]
    return reference.step_advantages(
        advantages, answer_correct, step_ids, step_valid, num_steps, penalty=penalty, round_weights=round_weights
    )


def _check(
    advantages: torch.Tensor,
    answer_correct: torch.Tensor,
    step_ids: torch.Tensor,
    step_valid: torch.Tensor,
    num_steps: torch.Tensor,
) -> None:
    require(step_ids.dim() == 2, f"step_ids must have shape (B, T), not {tuple(step_ids.shape)}")
    require(step_valid.dim() == 2, f"step_valid must have shape (B, K), not {tuple(step_valid.shape)}")
    (batch, tokens), max_steps, device = step_ids.shape, step_valid.shape[1], step_ids.device
    check_tensor("advantages", advantages, (batch,), device)
    check_tensor("answer_correct", answer_correct, (batch,), device, torch.bool)
    check_tensor("step_ids", step_ids, (batch, tokens), device, torch.int64)
    check_tensor("step_valid", step_valid, (batch, max_steps), device, torch.bool)
    check_tensor("num_steps", num_steps, (batch,), device, torch.int64)
    if device.type == "cpu":
        in_range = (num_steps >= 0) & (num_steps <= max_steps)
        require(bool(in_range.all()), f"num_steps must be in [0, {max_steps}], the steps of step_valid")
        require(bool((step_ids >= -1).all()), "step_ids must be -1 (outside every step) or a step's 0-based number")
