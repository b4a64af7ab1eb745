"""The definition of every operator in plain PyTorch, for any device and floating dtype, fp64 included.

The faster implementations are tested against these in fp64; where there is none, these run. Arguments are checked by
the public functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .records import LossConfig, RowInputs, RowOutputs, SegmentedAdvantages

# (k, K) -> weight of invalid step k of K, both int64, k 1-based.
StepPenalty = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _lateness(k: torch.Tensor, num_steps: torch.Tensor) -> torch.Tensor:
    """0 at the first of several steps, 1 at the last; 1 for a single step."""
    return torch.where(num_steps > 1, (k - 1) / (num_steps - 1).clamp(min=1).double(), 1.0)


PENALTIES: dict[str, StepPenalty] = {
    "exponential": lambda k, num_steps: torch.exp(1.0 - _lateness(k, num_steps)),
    "linear": lambda k, num_steps: 2.0 - _lateness(k, num_steps),
    "none": lambda k, num_steps: torch.ones_like(k * num_steps, dtype=torch.float64),
    "reversed": lambda k, num_steps: torch.exp(1.0 - _lateness(num_steps + 1 - k, num_steps)),
}


def step_weights(
    penalty: StepPenalty | torch.Tensor, num_steps: torch.Tensor, max_steps: int
) -> torch.Tensor:  # [B, max_steps] fp64
    """The weight of each step of each completion if it is invalid: by formula, or from a table by k or by K and k."""
    if not isinstance(penalty, torch.Tensor):
        k = torch.arange(1, max_steps + 1, device=num_steps.device)[None]
        weights = penalty(k, num_steps[:, None]).double()
    elif penalty.dim() == 2:
        weights = penalty[(num_steps - 1).clamp(min=0), :max_steps].double()
    else:
        weights = penalty[:max_steps].double()
    return weights.expand(len(num_steps), max_steps)


def shaped_advantages(
    advantages: torch.Tensor,  # [B]
    answer_correct: torch.Tensor,  # [B] bool
    step_valid: torch.Tensor,  # [B, K] bool
    num_steps: torch.Tensor,  # [B] int64
    completions: torch.Tensor | None,  # [S] int64; None: row b of step_ids is completion b
    step_ids: torch.Tensor,  # [S] or [B, T] int64
    *,
    penalty: StepPenalty | torch.Tensor,
    round_weights: bool,
) -> torch.Tensor:  # like step_ids
    """The advantage at step `step_ids` (-1: outside every step) of the completion beside it."""
    max_steps = step_valid.shape[1]
    if completions is None:
        completions = torch.arange(len(advantages), device=advantages.device)[:, None]
    plain = advantages[completions].expand(step_ids.shape)
    if max_steps == 0:
        return plain.clone()
    weights = step_weights(penalty, num_steps, max_steps)
    if round_weights:
        weights = torch.round(weights, decimals=2)
    signed = torch.where(step_valid, 1.0, -weights).to(advantages.dtype)  # [B, K]
    shaped = signed[completions, step_ids.clamp(0, max_steps - 1)] * plain.abs()
    in_judged_step = (step_ids >= 0) & (step_ids < num_steps[completions])
    return torch.where(in_judged_step & ~answer_correct[completions], shaped, plain)


def token_losses(
    logits: torch.Tensor, inputs: RowInputs, config: LossConfig, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses, differentiable by autograd, then log-probabilities, clipped, KL and entropy of rows; see `RowOutputs`."""
    weights, advantages = inputs.weights, inputs.advantages
    if isinstance(advantages, SegmentedAdvantages):
        advantages = advantages.per_token(len(weights))
    used = weights != 0
    # Masked before exp: what stands in an unused row, NaN included, reaches neither the loss nor the gradient.
    logits = logits.masked_fill(~used[:, None], 0.0)
    log_softmax = torch.log_softmax(logits / config.temperature, dim=-1)
    logprobs = log_softmax.gather(1, inputs.targets.masked_fill(~used, 0)[:, None]).squeeze(1)

    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs
    log_ratio = (logprobs - old).masked_fill(~used, 0.0)
    lower, upper = 1.0 - config.epsilon_low, 1.0 + config.epsilon_high
    ratio = log_ratio.detach().exp()
    clipped = torch.where(advantages > 0, ratio > upper, ratio < lower) & (advantages != 0) & used
    bound = torch.full_like(advantages, lower).masked_fill(advantages > 0, upper)
    idle = clipped | (advantages == 0)  # min() takes the bound there, and exp must not overflow beside it
    losses = -advantages * torch.where(clipped, bound, log_ratio.masked_fill(idle, 0.0).exp())
    if inputs.sampler_logprobs is not None:
        mismatch = (old - inputs.sampler_logprobs).masked_fill(~used | (advantages == 0), 0.0)
        losses = losses * mismatch.exp().clamp(max=config.importance_cap)

    kl = torch.zeros_like(logprobs)
    if inputs.ref_logprobs is not None:
        difference = (inputs.ref_logprobs - logprobs).masked_fill(~used, 0.0)
        kl = torch.expm1(difference) - difference
        if config.beta != 0:
            losses = losses + config.beta * kl
    losses = weights * losses.masked_fill(~used, 0.0)
    entropy = _entropy(log_softmax.detach()).masked_fill(~used, 0.0) if with_entropy else None
    return losses, logprobs.detach().masked_fill(~used, 0.0), clipped, kl.detach(), entropy


def loss_rows(
    logits: torch.Tensor, inputs: RowInputs, config: LossConfig, with_entropy: bool, gradient: str
) -> RowOutputs:
    """As `rows.loss_rows`; `inputs` have the dtype of the computation."""
    leaf = logits.detach().to(inputs.weights.dtype).requires_grad_(gradient != "none")
    with torch.set_grad_enabled(leaf.requires_grad):
        losses, logprobs, clipped, kl, entropy = token_losses(leaf, inputs, config, with_entropy)
        dlogits = torch.autograd.grad(losses.sum(), leaf)[0] if leaf.requires_grad else None
    if dlogits is not None:
        dlogits = dlogits.to(logits.dtype) if gradient == "new" else logits.detach().copy_(dlogits)
    return RowOutputs(losses.detach(), logprobs, clipped, kl, entropy, dlogits)


def _entropy(log_softmax: torch.Tensor) -> torch.Tensor:
    probabilities = log_softmax.exp()
    return -(probabilities * log_softmax.masked_fill(probabilities == 0, 0.0)).sum(-1)
