"""The clipped policy loss of completion tokens, from logits to a differentiable scalar.

The fast paths compute the gradient in the forward pass, while a row of logits is at hand: the coefficient of every
token is known there. Bytes for N rows of V logits of s bytes: sNV read, once by the C++ and CUDA kernels and twice by
the Triton kernel, and sNV of gradient written; no other array of that size, and not even that one with `inplace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import reference
from .checks import check_tensor, require
from .dispatch import implementation_of, in_context_of_forward, remember_context
from .records import LossConfig, RowInputs, SegmentedAdvantages
from .rows import Gradient, loss_rows, times_upstream


@dataclass(frozen=True)
class PolicyLoss:
    """The loss and what is worth logging of each token. Only `loss` carries a gradient.

    loss: [] sum over tokens of weight times token loss. logprobs: [N] of the targets, nats. clipped: [N] bool, the
    clip cut this token's gradient. kl: [N] k3 estimate against the reference policy, nats (0 without one). entropy: [N]
    of the next-token distribution, nats, or None where it was not asked for. Rows of weight 0 hold 0 and False.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor | None


def policy_loss(
    logits: torch.Tensor,  # [N, V]
    targets: torch.Tensor,  # [N] int64
    *,
    advantages: torch.Tensor | SegmentedAdvantages,  # [N]
    weights: torch.Tensor,  # [N]
    old_logprobs: torch.Tensor | None = None,  # [N]
    ref_logprobs: torch.Tensor | None = None,  # [N]
    sampler_logprobs: torch.Tensor | None = None,  # [N]
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    importance_cap: float = 2.0,
    with_entropy: bool = False,
    inplace: bool = False,
) -> PolicyLoss:
    """PPO-clipped loss with an optional k3 KL, one advantage per token (arXiv 2606.31825, equation of the objective).

    With logp the log-softmax of logits / temperature at the target, ratio = exp(logp - old), d = ref - logp and the
    constant c = min(exp(old - sampler), importance_cap), 1 without a sampler:

        token_loss = -c min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(d) - d - 1)
        loss = sum_n weights[n] token_loss[n]

    Args:
        logits: raw logits, any floating dtype; computed in fp32, or fp64 for fp64. Columns may be -inf. The gradient
            has their dtype and is rounded to it before the gradient from upstream enters: with fp16 on a device, put a
            loss scale into the weights.
        targets: the sampled tokens, in [0, V) wherever the weight is not 0.
        advantages: A, one per token, or one per segment of tokens, such as `segment_advantages` gives.
        weights: express every normalisation, such as 1 / (tokens of the completion * completions). A row of weight 0
            is skipped: it gives exactly 0 loss and gradient whatever it holds, NaN included.
        old_logprobs: of the policy before this update; None: the current one's (ratio 1, with its gradient).
        ref_logprobs: of the frozen reference policy; gives `kl`, and enters the loss through beta.
        sampler_logprobs: what the engine that sampled gave its tokens; corrects the policy term (not the KL) for its
            difference from the trainer's own old_logprobs (truncated importance sampling, as in TRL and verl).
        epsilon_low, epsilon_high: clip range of the ratio.
        beta: weight of the KL.
        temperature: of the sampler.
        importance_cap: bound of the importance weight.
        with_entropy: also compute the entropy.
        inplace: write the gradient over the logits, which are destroyed, instead of into a second array of their size.
            Whoever else reads their values later gets gradients; where that is autograd, it raises, as after any
            in-place change. Refused for a leaf that requires a gradient or a view of one, and for logits whose rows
            are not contiguous or overlap. Nothing is written where no gradient is recorded.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value; the message names it. Values of
            tensors are checked on the CPU, where reading them does not wait for a device, and within
            `checks.check_values`.
        RuntimeError: `dispatch.use` forces an implementation that cannot run here.
    """
    config = LossConfig(epsilon_low, epsilon_high, beta, temperature, importance_cap)
    inputs = RowInputs(targets, advantages, weights, old_logprobs, ref_logprobs, sampler_logprobs)
    require(logits.dim() == 2 and logits.shape[1] > 0, f"logits must have shape (N, V), not {tuple(logits.shape)}")
    check_tensor("logits", logits, tuple(logits.shape), logits.device)
    rows, vocab = logits.shape
    check_policy_arguments(inputs, config, rows, vocab, logits.device)
    if inplace:
        _check_inplace(logits)
    # Function.forward cannot see whether its caller records gradients.
    recording = logits.requires_grad and torch.is_grad_enabled()
    gradient: Gradient = "none" if not recording else "inplace" if inplace else "new"
    implementation = implementation_of("policy_loss", logits.device, logits.dtype)
    if implementation == "reference" and not inplace:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        losses, logprobs, clipped, kl, entropy = reference.token_losses(
            logits.to(dtype), inputs.to(dtype), config, with_entropy
        )
        return PolicyLoss(losses.sum(), logprobs, clipped, kl, entropy)
    if implementation == "cpp" and gradient == "new" and logits.dtype != torch.float32:
        # It needs an fp32 copy anyhow: nobody else reads that one, and its gradient is rounded after scaling.
        logits, gradient = logits.float(), "inplace"
    return PolicyLoss(*_PolicyLoss.apply(logits, inputs, config, with_entropy, gradient))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, inputs: RowInputs, config: LossConfig, with_entropy: bool, gradient: Gradient
    ) -> tuple[torch.Tensor | None, ...]:
        found = loss_rows(logits, inputs, config=config, entropy=with_entropy, gradient=gradient)
        remember_context(ctx)
        ctx.save_for_backward(found.dlogits)
        values = (found.logprobs, found.clipped, found.kl, found.entropy)
        ctx.mark_non_differentiable(*(tensor for tensor in values if tensor is not None))
        return found.losses.sum(), *values

    @staticmethod
    @once_differentiable
    @in_context_of_forward
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        return times_upstream(dlogits, grad_loss), None, None, None, None


def check_policy_arguments(inputs: RowInputs, config: LossConfig, rows: int, vocab: int, device: torch.device) -> None:
    """Refuse inputs that do not fit `rows` tokens, `vocab` and the config; the message names the argument."""
    inputs.check(rows, vocab, device)
    needless = config.beta == 0 or inputs.ref_logprobs is not None
    require(needless, f"ref_logprobs must be given when beta is not 0 (beta={config.beta})")


def _check_inplace(logits: torch.Tensor) -> None:
    owner = logits if logits._base is None else logits._base
    require(
        not (owner.is_leaf and owner.requires_grad),
        "inplace would overwrite a leaf that requires a gradient: logits must be the result of an operation",
    )
    (rows, vocab), (row_stride, column_stride) = logits.shape, logits.stride()
    require(
        (vocab == 1 or column_stride == 1) and (rows <= 1 or row_stride >= vocab),
        f"inplace needs logits with contiguous rows that do not overlap, not the strides {logits.stride()}",
    )
