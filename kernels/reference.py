"""The definition of every operator in plain PyTorch, for any device and floating dtype, fp64 included.

The faster implementations are tested against these in fp64; where there is none, these run. Arguments are checked by
the public functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# (k, K) -> weight of invalid step k of K, both int64, k 1-based.
StepPenalty = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _lateness(k: torch.Tensor, num_steps: torch.Tensor) -> torch.Tensor:
    """0 at the first of several steps, 1 at the last; 1 for a single step."""
    return torch.where(num_steps > 1, (k - 1) / (num_steps - 1).clamp(min=1).double(), 1.0)


PENALTIES: dict[str, StepPenalty] = {
    "exponential": lambda k, num_steps: torch.exp(1.0 - _lateness(k, num_steps)),
    "linear": lambda k, num_steps: 2.0 - _lateness(k, num_steps),
    "none": lambda k, num_steps: torch.ones_like(k * num_steps, dtype=torch.float64),
}


def step_advantages(
    advantages: torch.Tensor,  # [B]
    answer_correct: torch.Tensor,  # [B] bool
    step_ids: torch.Tensor,  # [B, T] int64
    step_valid: torch.Tensor,  # [B, K] bool
    num_steps: torch.Tensor,  # [B] int64
    *,
    penalty: StepPenalty,
    round_weights: bool,
) -> torch.Tensor:  # [B, T]
    plain = advantages[:, None].expand(step_ids.shape)
    max_steps = step_valid.shape[1]
    if max_steps == 0:
        return plain.clone()
    k = torch.arange(1, max_steps + 1, device=step_ids.device)[None]
    weights = penalty(k, num_steps[:, None]).double()
    if round_weights:
        weights = torch.round(weights, decimals=2)
    signed = torch.where(step_valid, 1.0, -weights).to(advantages.dtype)  # [B, K]
    shaped = signed.gather(1, step_ids.clamp(0, max_steps - 1)) * advantages.abs()[:, None]
    in_judged_step = (step_ids >= 0) & (step_ids < num_steps[:, None])
    return torch.where(in_judged_step & ~answer_correct[:, None], shaped, plain)


def policy_loss(
    logits: torch.Tensor,  # [N, V]
    targets: torch.Tensor,  # [N] int64
    advantages: torch.Tensor,  # [N]
    weights: torch.Tensor,  # [N]
    old_logprobs: torch.Tensor | None,  # [N]
    ref_logprobs: torch.Tensor | None,  # [N]
    *,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    temperature: float,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss [], then log-probabilities, clipped, KL and entropy [N]; the gradient is autograd's."""
    used = weights != 0
    # Masked before exp: what stands in an unused row, NaN included, reaches neither the loss nor the gradient.
    logits = logits.masked_fill(~used[:, None], 0.0)
    log_softmax = torch.log_softmax(logits / temperature, dim=-1)
    logprobs = log_softmax.gather(1, targets.masked_fill(~used, 0)[:, None]).squeeze(1)

    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_ratio = (logprobs - old).masked_fill(~used, 0.0)
    lower, upper = 1.0 - epsilon_low, 1.0 + epsilon_high
    ratio = log_ratio.detach().exp()
    clipped = torch.where(advantages > 0, ratio > upper, ratio < lower) & (advantages != 0) & used
    bound = torch.full_like(advantages, lower).masked_fill(advantages > 0, upper)
    idle = clipped | (advantages == 0)  # min() takes the bound there, and exp must not overflow beside it
    token_loss = -advantages * torch.where(clipped, bound, log_ratio.masked_fill(idle, 0.0).exp())

    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        difference = (ref_logprobs - logprobs).masked_fill(~used, 0.0)
        kl = torch.expm1(difference) - difference
        if beta != 0:
            token_loss = token_loss + beta * kl
    loss = (weights * token_loss.masked_fill(~used, 0.0)).sum()
    entropy = None
    if with_entropy:
        entropy = _entropy(log_softmax.detach()).masked_fill(~used, 0.0)
    return loss, logprobs.detach().masked_fill(~used, 0.0), clipped, kl.detach(), entropy


def _entropy(log_softmax: torch.Tensor) -> torch.Tensor:
    probabilities = log_softmax.exp()
    return -(probabilities * log_softmax.masked_fill(probabilities == 0, 0.0)).sum(-1)
