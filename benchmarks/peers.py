"""The peers of the head and policy loss, each as a loss of one problem, where it is installed.

Liger's losses take one advantage per sequence, so every problem has constant advantages over each sequence, and as many
tokens in each. Whatever they are in their own trainers, the defaults here are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Protocol

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
        cls,
        num_sequences: int,
        length: int,
        size: int,
        vocab: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        frozen: bool = False,
    ) -> HeadProblem:
        """Random, with logits of unit variance. frozen: the weight wants no gradient, as under LoRA."""
        generator = torch.Generator(device).manual_seed(0)
        rows = num_sequences * length
        hidden = torch.randn(rows, size, generator=generator, device=device).to(dtype)
        weight = (torch.randn(vocab, size, generator=generator, device=device) / size**0.5).to(dtype)
        targets = torch.randint(vocab, (rows,), generator=generator, device=device)
        advantages = torch.randn(num_sequences, generator=generator, device=device).repeat_interleave(length)
        weights = torch.full((rows,), 1.0 / rows, device=device)
        hidden.requires_grad_()
        return cls(hidden, weight.requires_grad_(not frozen), targets, advantages, weights, num_sequences)

    def gradients(self, loss: Loss) -> list[torch.Tensor]:
        """Forward and backward: the gradients of the hidden states and, unless it is frozen, of the weight."""
        leaves = [leaf for leaf in (self.hidden, self.weight) if leaf.requires_grad]
        for leaf in leaves:
            leaf.grad = None
        loss(self).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    def true_gradients(self, rows_at_once: int = 1024) -> list[torch.Tensor]:
        """The same by plain formulas in fp32 products (fp64 for fp64), a few rows of logits at a time."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        hidden, weight = self.hidden.detach().to(dtype), self.weight.detach().to(dtype)
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), rows_at_once):
            part = slice(start, start + rows_at_once)
            # d loss / d logits = weight * -advantage * (onehot - softmax), with a ratio of 1
            coefficient = (self.weights[part].to(dtype) * self.advantages[part].to(dtype))[:, None]
            dlogits = (hidden[part] @ weight.t()).softmax(-1)
            dlogits[torch.arange(len(dlogits), device=dlogits.device), self.targets[part]] -= 1.0
            dlogits.mul_(coefficient)
            dhidden[part] = dlogits @ weight
            if self.weight.requires_grad:
                dweight.addmm_(dlogits.t(), hidden[part])
        return [dhidden, dweight] if self.weight.requires_grad else [dhidden]


Loss = Callable[[HeadProblem], torch.Tensor]


def ours(
    problem: HeadProblem, chunk_rows: int | None = None, weight_grad_dtype: torch.dtype | None = None
) -> torch.Tensor:
    from mrpo.kernels import fused_linear_policy_loss

    chosen = {} if chunk_rows is None else {"chunk_rows": chunk_rows}
    return fused_linear_policy_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        advantages=problem.advantages,
        weights=problem.weights,
        weight_grad_dtype=weight_grad_dtype,
        **chosen,
    ).loss


def eager(problem: HeadProblem) -> torch.Tensor:
    """Full logits and autograd, as the paper's code."""
    logits = (problem.hidden @ problem.weight.t()).float()
    return clipped(problem, logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0])


def trl(problem: HeadProblem) -> torch.Tensor:
    """TRL's chunked log-probabilities with the same loss on top."""
    return clipped(problem, trl_logprobs(problem.hidden, problem.weight, problem.targets))


def trl_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction

    # The chunk of the vocabulary that TRL's trainers use.
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32_768, None, 1.0, ())[0]


def liger_fused(problem: HeadProblem) -> torch.Tensor:
    """Liger's fused linear GRPO loss, one sequence a chunk."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    count = problem.num_sequences
    targets = problem.targets.view(count, -1)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=True)
    value, _ = loss(
        problem.hidden.view(count, targets.shape[1], -1),
        problem.weight,
        targets,
        torch.ones_like(targets),
        problem.advantages.view(count, -1)[:, 0],
    )
    return value


def liger_triton(problem: HeadProblem) -> torch.Tensor:
    """Liger's Triton GRPO loss on full logits, whose gradient takes their place."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    count = problem.num_sequences
    targets = problem.targets.view(count, -1)
    # It wants the position after each sequence too, as models give it, and ignores its logits.
    hidden = torch.nn.functional.pad(problem.hidden.view(count, targets.shape[1], -1), (0, 0, 0, 1))
    logits = hidden @ problem.weight.t()
    advantages = problem.advantages.view(count, -1)[:, 0].contiguous()
    token_losses, *_ = triton_grpo_loss(
        logits, None, None, targets, advantages, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2, loss_type="grpo"
    )
    return (token_losses.reshape(-1) * problem.weights).sum()


def apple_cce(problem: HeadProblem) -> torch.Tensor:
    """Log-probabilities from Apple's Cut Cross-Entropy, which skips gradients below a threshold; our loss on top."""
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="none")
    return clipped(problem, -nll)


class HasAdvantages(Protocol):
    """Anything with advantages and weights, [N]."""

    @property
    def advantages(self) -> torch.Tensor: ...

    @property
    def weights(self) -> torch.Tensor: ...


def clipped(problem: HasAdvantages, logprobs: torch.Tensor) -> torch.Tensor:
    """The policy loss of a first update, whose ratio is 1."""
    ratio = (logprobs - logprobs.detach()).exp()
    surrogate = torch.minimum(ratio * problem.advantages, ratio.clamp(0.8, 1.2) * problem.advantages)
    return -(surrogate * problem.weights).sum()


@dataclass(frozen=True)
class Peer:
    """A loss, the module it needs, and what to install where that is missing."""

    name: str
    loss: Loss
    module: str = "torch"
    package: str = "torch"
    needs_gpu: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here."""
        if self.needs_gpu and not torch.cuda.is_available():
            return "needs a GPU"
        return None if find_spec(self.module) else f"not installed (pip install {self.package})"


EAGER, TRL, LIGER_FUSED = "eager, full logits", "TRL chunked", "Liger fused linear"
OURS, LEAN = "ours", "ours, lean"

HEADS = (
    Peer(OURS, ours, "mrpo", "mrpo"),
    Peer(EAGER, eager),
    Peer(TRL, trl, "trl", "trl"),
    Peer(LIGER_FUSED, liger_fused, "liger_kernel", "liger-kernel"),
    Peer("Liger Triton, full logits", liger_triton, "liger_kernel", "liger-kernel", needs_gpu=True),
    Peer("Apple CCE", apple_cce, "cut_cross_entropy", "cut-cross-entropy", needs_gpu=True),
)


def variants_of_ours(dtype: torch.dtype) -> Iterator[Peer]:
    """Chunks of the tokens, and the dtype in which the weight's gradient is summed over them."""
    for total in dict.fromkeys((torch.float32, dtype)):
        for rows in (1024, 2048, 4096, 8192):
            name = f"ours, {rows} rows, dW in {str(total).removeprefix('torch.')}"
            yield Peer(name, partial(ours, chunk_rows=rows, weight_grad_dtype=total), "mrpo", "mrpo")
