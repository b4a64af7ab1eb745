"""The clipped policy loss of completion tokens, from logits to a differentiable scalar.

The fast paths compute the gradient in the forward pass, while a row of logits is at hand: the coefficient of every
token is known there. Bytes for N rows of V fp32 logits: 4NV read, 4NV of gradient written, no other array of that size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import reference
from .checks import check_tensor, require
from .dispatch import implementation_of
from .policy_loss_cpp import policy_loss_cpp


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
    advantages: torch.Tensor,  # [N]
    weights: torch.Tensor,  # [N]
    old_logprobs: torch.Tensor | None = None,  # [N]
    ref_logprobs: torch.Tensor | None = None,  # [N]
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> PolicyLoss:
    """PPO-clipped loss with an optional k3 KL, one advantage per token (arXiv 2606.31825, equation of the objective).

    With logp the log-softmax of logits / temperature at the target, ratio = exp(logp - old) and d = ref - logp:

        token_loss = -min(ratio A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) A) + beta (exp(d) - d - 1)
        loss = sum_n weights[n] token_loss[n]

    Args:
        logits: raw logits, any floating dtype; computed in fp32, or fp64 for fp64. Columns may be -inf.
        targets: the sampled tokens, in [0, V) wherever the weight is not 0.
        advantages: A, one per token.
        weights: express every normalisation, such as 1 / (tokens of the completion * completions). A row of weight 0
            is skipped: it gives exactly 0 loss and gradient whatever it holds, NaN included.
        old_logprobs: of the policy that sampled; None: the current one's (ratio 1, with its gradient).
        ref_logprobs: of the frozen reference policy; gives `kl`, and enters the loss through beta.
        epsilon_low, epsilon_high: clip range of the ratio.
        beta: weight of the KL.
        temperature: of the sampler.
        with_entropy: also compute the entropy.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value; the message names it. Targets are
            checked on the CPU only, where reading them does not wait for a device.
        RuntimeError: `dispatch.use` forces an implementation that cannot run here.
    """
    _check_numbers(epsilon_low, epsilon_high, beta, temperature)
    require(beta == 0 or ref_logprobs is not None, f"ref_logprobs must be given when beta is not 0 (beta={beta})")
    _check_tensors(logits, targets, advantages, weights, old_logprobs, ref_logprobs)
    implementation = implementation_of("policy_loss", logits.device, logits.dtype)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    outputs = (policy_loss_cpp if implementation == "cpp" else reference.policy_loss)(
        logits.to(dtype),
        targets,
        advantages.to(dtype),
        weights.to(dtype),
        None if old_logprobs is None else old_logprobs.to(dtype),
        None if ref_logprobs is None else ref_logprobs.to(dtype),
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
        temperature=temperature,
        with_entropy=with_entropy,
    )
    return PolicyLoss(*outputs)


def _check_numbers(epsilon_low: float, epsilon_high: float, beta: float, temperature: float) -> None:
    require(0.0 <= epsilon_low < 1.0, f"epsilon_low must be in [0, 1), not {epsilon_low}")
    require(0.0 <= epsilon_high < float("inf"), f"epsilon_high must be finite and at least 0, not {epsilon_high}")
    require(0.0 <= beta < float("inf"), f"beta must be finite and at least 0, not {beta}")
    require(0.0 < temperature < float("inf"), f"temperature must be finite and above 0, not {temperature}")


def _check_tensors(
    logits: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
) -> None:
    require(logits.dim() == 2 and logits.shape[1] > 0, f"logits must have shape (N, V), not {tuple(logits.shape)}")
    (rows, vocab), device = logits.shape, logits.device
    check_tensor("logits", logits, (rows, vocab), device)
    check_tensor("targets", targets, (rows,), device, torch.int64)
    tokenwise = {
        "advantages": advantages,
        "weights": weights,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    for name, tensor in tokenwise.items():
        if tensor is not None:
            check_tensor(name, tensor, (rows,), device)
            require(not tensor.requires_grad, f"{name} must not require a gradient; detach it")
    if device.type == "cpu":
        wrong = ((targets < 0) | (targets >= vocab)) & (weights != 0)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"targets[{row}] is {int(targets[row])}, outside the vocabulary [0, {vocab})")
