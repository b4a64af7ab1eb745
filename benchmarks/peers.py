"""The peers of the head and policy loss, each as (hidden, weight) -> loss on one problem, where it is installed.

Liger's losses take one advantage per sequence, so every problem has constant advantages over each sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class HeadProblem:
    """N = B x T completion tokens of a head: hidden [N, H], weight [V, H], targets [N], advantages and weights [N]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    num_sequences: int

    @classmethod
    def make(
        cls, num_sequences: int, length: int, size: int, vocab: int, *, dtype: torch.dtype, device: torch.device
    ) -> HeadProblem:
        generator = torch.Generator(device).manual_seed(0)
        rows = num_sequences * length
        hidden = torch.randn(rows, size, generator=generator, device=device).to(dtype)
        weight = (torch.randn(vocab, size, generator=generator, device=device) / size**0.5).to(dtype)
        targets = torch.randint(vocab, (rows,), generator=generator, device=device)
        advantages = torch.randn(num_sequences, generator=generator, device=device).repeat_interleave(length)
        weights = torch.full((rows,), 1.0 / rows, device=device)
        return cls(hidden.requires_grad_(), weight.requires_grad_(), targets, advantages, weights, num_sequences)


Loss = Callable[[HeadProblem], torch.Tensor]


def eager(problem: HeadProblem) -> torch.Tensor:
    """Full logits and autograd, as the paper's code."""
    logits = (problem.hidden @ problem.weight.t()).float()
    logprobs = logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
    return _clipped(problem, logprobs)


def ours(problem: HeadProblem) -> torch.Tensor:
    from mrpo.kernels import fused_linear_policy_loss

    return fused_linear_policy_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        advantages=problem.advantages,
        weights=problem.weights,
    ).loss


def trl(problem: HeadProblem) -> torch.Tensor:
    """TRL's chunked log-probabilities with the same loss on top."""
    from trl.kernels import ChunkedLogProbFunction

    # The chunk of the vocabulary that TRL's trainers use.
    logprobs, *_ = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.targets, 1.0, 32_768, None, 1.0, ()
    )
    return _clipped(problem, logprobs)


def liger(problem: HeadProblem) -> torch.Tensor:
    """Liger's fused linear GRPO loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    count = problem.num_sequences
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=True)
    targets = problem.targets.view(count, -1)
    value, _ = loss(
        problem.hidden.view(count, targets.shape[1], -1),
        problem.weight,
        targets,
        torch.ones_like(targets),
        problem.advantages.view(count, -1)[:, 0],
    )
    return value


def _clipped(problem: HeadProblem, logprobs: torch.Tensor) -> torch.Tensor:
    ratio = (logprobs - logprobs.detach()).exp()
    surrogate = torch.minimum(ratio * problem.advantages, ratio.clamp(0.8, 1.2) * problem.advantages)
    return -(surrogate * problem.weights).sum()


HEADS: dict[str, tuple[str, Loss]] = {
    "ours": ("mrpo", ours),
    "eager full logits": ("torch", eager),
    "TRL chunked": ("trl", trl),
    "Liger fused linear": ("liger_kernel", liger),
}


def installed() -> dict[str, Loss]:
    """The implementations whose package is there."""
    return {name: loss for name, (package, loss) in HEADS.items() if find_spec(package) is not None}


def missing() -> list[str]:
    """The implementations that cannot be compared here."""
    return [name for name in HEADS if name not in installed()]
