"""Log-probabilities of target tokens from hidden states, whose logits are held for some tokens at a time.

Without gradients, for old and reference policies: 2NHV FLOPs. With gradients, for losses whose coefficients are not
known in the forward pass (a ratio of whole sequences, as in GSPO): 8NHV, the logits being computed again in the
backward pass, from which no one but this function could keep them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .checks import check_targets, check_tensor, require, values_are_checked
from .dispatch import in_context_of_forward, remember_context
from .linear import WeightGradient, check_linear, logit_chunks, plan_chunks, product_dtype
from .rows import LossConfig, RowInputs, loss_rows


def linear_logprobs(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [N] int64
    *,
    bias: torch.Tensor | None = None,  # [V]
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log_softmax((hidden @ weight.T + bias) / temperature) at the targets, [N], and the entropy, [N] or None, in nats.

    The log-probabilities are differentiable in hidden, weight and bias; the entropy is not.

    Args:
        hidden, weight, bias: of one floating dtype, or any under autocast. Logits are rounded to the dtype of the
            products, everything behind them is fp32 (fp64 for fp64).
        targets: in [0, V); on a GPU looked at only within `checks.check_values`.
        temperature: of the sampler.
        with_entropy: also return the entropy of each next-token distribution.
        chunk_rows: tokens whose logits are held at once; default: 4096, in the backward pass as in
            `fused_linear_policy_loss`.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value; the message names it.
    """
    check_linear(hidden, weight, bias)
    check_tensor("targets", targets, (hidden.shape[0],), hidden.device, torch.int64)
    if values_are_checked(hidden.device):
        check_targets(targets, weight.shape[0])
    require(chunk_rows is None or chunk_rows >= 1, f"chunk_rows must be at least 1, not {chunk_rows}")
    require(0.0 < temperature < float("inf"), f"temperature must be finite and above 0, not {temperature}")
    dtype = product_dtype(hidden)
    parts = (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    # Autocast is off inside: the operands have their dtype already, and sums must keep theirs.
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, entropy = _LinearLogprobs.apply(*parts, targets, temperature, with_entropy, chunk_rows)
    return logprobs, entropy


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_rows: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = hidden.shape[0]
        logprobs = hidden.new_empty(rows, dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.empty_like(logprobs) if with_entropy else None
        inputs = RowInputs(targets, torch.zeros_like(logprobs), torch.ones_like(logprobs))
        config = LossConfig(temperature=temperature)
        held, _ = plan_chunks(len(hidden), hidden.shape[1], weight.dtype, trained=False, chunk_rows=chunk_rows)
        for part, logits in logit_chunks(hidden, weight, bias, held):
            found = loss_rows(logits, inputs[part], config=config, entropy=with_entropy)
            logprobs[part] = found.logprobs
            if entropy is not None and found.entropy is not None:
                entropy[part] = found.entropy
        remember_context(ctx)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.chunk_rows = temperature, chunk_rows
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    @in_context_of_forward
    def backward(ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        held, sum_dtype = plan_chunks(
            len(hidden), hidden.shape[1], weight.dtype, trained=needs_weight, chunk_rows=ctx.chunk_rows
        )
        dweight = WeightGradient(weight, sum_dtype) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=grad_logprobs.dtype) if needs_bias else None
        # With ratio 1 the loss of a token with advantage A has the gradient -A d logprob.
        inputs = RowInputs(targets, -grad_logprobs, torch.ones_like(grad_logprobs))
        config = LossConfig(temperature=ctx.temperature)
        for part, logits in logit_chunks(hidden, weight, bias, held):
            dlogits = loss_rows(logits, inputs[part], config=config, gradient="inplace").dlogits
            assert dlogits is not None
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                dweight.add(dlogits, hidden[part])
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dbias.dtype)
        return (
            dhidden,
            None if dweight is None else dweight.result().to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            *([None] * 4),
        )
