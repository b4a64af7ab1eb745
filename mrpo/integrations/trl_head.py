"""The policy loss inside a TRL model's own forward, where DDP and ZeRO-3 gather what it needs.

TRL gives its models a forward that returns log-probabilities instead of logits. This one returns the loss, too,
computed from hidden states by `fused_linear_policy_loss`, and takes over the log-probabilities of old and reference
policies, so that all of them come from one kernel.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from mrpo.kernels import fused_linear_policy_loss, linear_logprobs

# Under these names model configs scale or cap their logits behind the head.
LOGIT_SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


@dataclass(frozen=True)
class LossTerms:
    """What the loss of a batch's completion tokens depends on, beside the logits.

    advantages, weights: (B, T); old_logprobs, ref_logprobs: (B, T) or None. A token of weight 0 takes no part.
    """

    advantages: torch.Tensor
    weights: torch.Tensor
    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    epsilon_low: float
    epsilon_high: float
    beta: float


@dataclass
class ModelWithLoss:
    """Stands for the model in TRL's call for log-probabilities, asks it for the loss as well, and keeps that."""

    model: Any
    terms: LossTerms
    loss: torch.Tensor | None = None

    def __call__(self, **inputs: Any) -> FusedCausalLMOutput:
        outputs = self.model(**inputs, loss_terms=self.terms)
        self.loss = outputs.loss
        return outputs


def head_problems(model: Any) -> list[str]:
    """Why the head of a Hugging Face model cannot be fused with the loss."""
    problems = []
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        problems.append(f"a head that is a {type(head).__name__}, not a Linear")
    elif hasattr(head.weight, "full_tensor"):
        problems.append("a head sharded by FSDP2")
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in LOGIT_SCALES}
    return problems + [f"{name}={value} of the model" for name, value in values.items() if value not in (None, 1.0)]


def add_policy_head(model: Any, *, temperature: float, head_in_fp32: bool) -> None:
    """Lets `model(..., labels=, fused_lm_head=True, loss_terms=LossTerms)` return loss, log-probabilities and entropy.

    Without `loss_terms` it returns log-probabilities and entropy, where no gradient is recorded; every other call goes
    to the forward that is there. As in TRL, labels are -100 but at completion tokens, and outputs have shape (B, L - 1)
    for L tokens. Entropies carry no gradient, and the log-probabilities beside a loss do not either.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() checks its arguments against this signature
    def forward(self: Any, *args: Any, loss_terms: LossTerms | None = None, **kwargs: Any) -> Any:
        if loss_terms is None and (torch.is_grad_enabled() or not kwargs.get("fused_lm_head")):
            return original(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        del kwargs["fused_lm_head"]
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        scored = labels != -100
        head = self.get_output_embeddings()
        rows = hidden[scored]
        precision: Any = nullcontext()
        if head_in_fp32:
            rows, precision = rows.float(), torch.autocast(rows.device.type, enabled=False)
        with precision, maybe_gather_lm_head_ctx(head.weight, head.bias):
            arguments = (rows, head.weight, labels[scored])
            if loss_terms is not None:
                return _loss(arguments, head.bias, loss_terms, scored, temperature)
            logprobs, entropy = linear_logprobs(*arguments, bias=head.bias, temperature=temperature, with_entropy=True)
        return FusedCausalLMOutput(log_probs=_spread(logprobs, scored), entropy=_spread(entropy, scored))

    model.forward = MethodType(forward, model)


def _loss(
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    terms: LossTerms,
    scored: torch.Tensor,
    temperature: float,
) -> FusedCausalLMOutput:
    taken = scored[:, -terms.weights.shape[1] :]

    def rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[taken]

    advantages, weights, old = terms.advantages[taken], terms.weights[taken], rows(terms.old_logprobs)
    result = fused_linear_policy_loss(
        *arguments,
        bias=bias,
        advantages=advantages,
        weights=weights,
        old_logprobs=old,
        ref_logprobs=rows(terms.ref_logprobs),
        epsilon_low=terms.epsilon_low,
        epsilon_high=terms.epsilon_high,
        beta=terms.beta,
        temperature=temperature,
        with_entropy=True,
    )
    logprobs, entropy = result.logprobs, result.entropy
    if terms.beta == 0:
        # The operator leaves out tokens that cannot move the loss; TRL's metrics count them, so they are scored alone.
        left_out = (weights != 0) & (advantages == 0)
        hidden, weight, targets = arguments
        with torch.no_grad():
            more_logprobs, more_entropy = linear_logprobs(
                hidden[left_out], weight, targets[left_out], bias=bias, temperature=temperature, with_entropy=True
            )
        assert entropy is not None
        assert more_entropy is not None
        logprobs = logprobs.masked_scatter(left_out, more_logprobs)
        entropy = entropy.masked_scatter(left_out, more_entropy)
    return FusedCausalLMOutput(loss=result.loss, log_probs=_spread(logprobs, scored), entropy=_spread(entropy, scored))


def _spread(values: torch.Tensor | None, scored: torch.Tensor) -> torch.Tensor | None:
    """Values of the scored tokens at their places, 0 elsewhere."""
    return None if values is None else values.new_zeros(scored.shape).masked_scatter(scored, values)
