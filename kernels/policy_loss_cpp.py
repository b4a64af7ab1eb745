"""The policy loss in C++ (csrc/policy_loss_cpu.cpp): fp32 on the CPU, rows spread over PyTorch's threads."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .dispatch import extension

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def policy_loss_cpp(
    logits: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    *,
    epsilon_low: float,
    epsilon_high: float,
    beta: float,
    temperature: float,
    with_entropy: bool,
) -> Outputs:
    """As `reference.policy_loss`, for fp32 tensors on the CPU."""
    numbers = {"epsilon_low": epsilon_low, "epsilon_high": epsilon_high, "beta": beta, "temperature": temperature}
    vectors = [
        None if tensor is None else tensor.contiguous()
        for tensor in (targets, advantages, weights, old_logprobs, ref_logprobs)
    ]
    # Function.forward cannot see whether its caller records gradients.
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return _PolicyLossCpp.apply(logits, vectors, numbers, with_entropy, with_gradient)


class _PolicyLossCpp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        vectors: list[torch.Tensor | None],
        numbers: dict[str, float],
        with_entropy: bool,
        with_gradient: bool,
    ) -> Outputs:
        rows, vocab = logits.shape
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        losses, logprobs, kl = torch.empty(3, rows).unbind()
        clipped = torch.empty(rows, dtype=torch.bool)
        entropy = torch.empty(rows) if with_entropy else None
        dlogits = torch.empty(rows, vocab) if with_gradient else None
        names = ("targets", "advantages", "weights", "old_logprobs", "ref_logprobs")
        outputs = {"losses": losses, "logprobs": logprobs, "kl": kl, "clipped": clipped}
        tensors = {**dict(zip(names, vectors, strict=True)), **outputs, "entropy": entropy, "dlogits": dlogits}
        module = extension()
        assert module is not None
        module.policy_loss_cpu(
            logits=logits.data_ptr(),
            rows=rows,
            vocab=vocab,
            row_stride=logits.stride(0),
            num_threads=torch.get_num_threads(),
            **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
            **numbers,
        )
        ctx.save_for_backward(dlogits)
        ctx.mark_non_differentiable(*(tensor for tensor in (logprobs, clipped, kl, entropy) if tensor is not None))
        return losses.sum(), logprobs, clipped, kl, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        # A plain loss.backward() has no pass over the logits left to do; on the CPU looking at the value is free.
        scaled = dlogits if grad_loss.item() == 1.0 else dlogits * grad_loss
        return scaled, None, None, None, None
