"""The policy loss from hidden states, its gradients computed in the forward pass.

For each chunk of tokens: logits (2NHV FLOPs over all chunks), loss and gradient of the logits in their place, then the
gradients of the hidden states (2NHV) and of the weight (2NHV). 6NHV in all, 4NHV with a frozen head. Nothing is kept
for the backward pass but the gradients, which it scales by whatever comes from upstream. This needs the coefficient of
every token in the forward pass: a ratio of whole sequences goes through `linear_logprobs` instead.

Bytes beside the products, in a dtype of s bytes: sNV logits written, read, overwritten and read twice; with several
chunks the weight gradient, 4HV in fp32, read and written once a chunk, so that small chunks cost time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .checks import require
from .dispatch import in_context_of_forward, remember_context
from .linear import WeightGradient, check_linear, logit_chunks, plan_chunks, product_dtype
from .policy_loss import PolicyLoss, check_policy_arguments
from .rows import LossConfig, RowInputs, SegmentedAdvantages, loss_rows, times_upstream


def fused_linear_policy_loss(
    hidden: torch.Tensor,  # [N, H]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [N] int64
    *,
    advantages: torch.Tensor | SegmentedAdvantages,  # [N]
    weights: torch.Tensor,  # [N]
    old_logprobs: torch.Tensor | None = None,  # [N]
    ref_logprobs: torch.Tensor | None = None,  # [N]
    sampler_logprobs: torch.Tensor | None = None,  # [N]
    bias: torch.Tensor | None = None,  # [V]
    logit_softcap: float | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    importance_cap: float = 2.0,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> PolicyLoss:
    """`policy_loss` of the logits hidden @ weight.T + bias, of which no more than `chunk_rows` x V are ever held.

    Tokens that cannot contribute (weight 0, or advantage 0 without a KL) are dropped before the products; they hold 0
    in every output. Their number is read from the device once. A weight or bias that needs no gradient costs none.

    Args:
        hidden, weight, bias: of one floating dtype, or any under autocast. Logits are rounded to the dtype of the
            products, everything behind them is fp32 (fp64 for fp64).
        targets, advantages, weights, old_logprobs, ref_logprobs, sampler_logprobs, epsilon_low, epsilon_high, beta,
            temperature, importance_cap, with_entropy: as in `policy_loss`.
        logit_softcap: refused unless None; no supported model family caps its logits.
        chunk_rows: tokens whose logits are held at once; 8192 x 151,936 in bf16 take 2.3 GiB. Default: 4096; all, if
            their logits take no more than those of 4096 and the sum of the weight's gradient (`plan_chunks`).
        weight_grad_dtype: in which the weight's gradient is summed over chunks; default fp32 (fp64 for fp64). It is
            returned in the dtype of the weight.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, device or value; the message names it.
    """
    require(logit_softcap is None, f"logit_softcap={logit_softcap} is not supported; it must be None")
    require(chunk_rows is None or chunk_rows >= 1, f"chunk_rows must be at least 1, not {chunk_rows}")
    config = LossConfig(epsilon_low, epsilon_high, beta, temperature, importance_cap)
    check_linear(hidden, weight, bias)
    inputs = RowInputs(targets, advantages, weights, old_logprobs, ref_logprobs, sampler_logprobs)
    check_policy_arguments(inputs, config, hidden.shape[0], weight.shape[0], hidden.device)
    dtype = product_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    parts = (hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    recording = torch.is_grad_enabled()
    needs = tuple(recording and part is not None and part.requires_grad for part in parts)
    # Autocast is off inside: the operands have their dtype already, and sums must keep theirs.
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = _FusedLinearPolicyLoss.apply(
            *parts, inputs.to(wide), config, with_entropy, chunk_rows, weight_grad_dtype, needs
        )
    return PolicyLoss(*outputs)


class _FusedLinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: RowInputs,
        config: LossConfig,
        with_entropy: bool,
        chunk_rows: int | None,
        weight_grad_dtype: torch.dtype | None,
        needs: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor | None, ...]:
        rows = hidden.shape[0]
        positions = contributing_rows(inputs, config, rows)
        if len(positions) < rows:
            hidden, inputs = hidden[positions], inputs[positions]
        needs_hidden, needs_weight, needs_bias = needs
        chunk_rows, sum_dtype = plan_chunks(
            len(hidden),
            hidden.shape[1],
            weight.dtype,
            trained=needs_weight,
            chunk_rows=chunk_rows,
            sum_dtype=weight_grad_dtype,
        )
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = WeightGradient(weight, sum_dtype) if needs_weight else None
        dbias = torch.zeros_like(weight[:, 0], dtype=inputs.weights.dtype) if needs_bias else None
        values: dict[str, list[torch.Tensor]] = {"losses": [], "logprobs": [], "clipped": [], "kl": [], "entropy": []}
        for part, logits in logit_chunks(hidden, weight, bias, chunk_rows):
            found = loss_rows(
                logits,
                inputs[part],
                config=config,
                entropy=with_entropy,
                gradient="inplace" if any(needs) else "none",
            )
            for name, chunks in values.items():
                if (value := getattr(found, name)) is not None:
                    chunks.append(value)
            if found.dlogits is None:
                continue
            if dhidden is not None:
                torch.mm(found.dlogits, weight, out=dhidden[part])
            if dweight is not None:
                dweight.add(found.dlogits, hidden[part])
            if dbias is not None:
                dbias += found.dlogits.sum(0, dtype=dbias.dtype)

        def whole(name: str) -> torch.Tensor:
            dtype = torch.bool if name == "clipped" else inputs.weights.dtype
            found = torch.cat(values[name]) if values[name] else hidden.new_empty(0, dtype=dtype)
            return found if len(positions) == rows else found.new_zeros(rows).index_copy_(0, positions, found)

        if dhidden is not None and len(positions) < rows:
            dhidden = dhidden.new_zeros(rows, hidden.shape[1]).index_copy_(0, positions, dhidden)
        remember_context(ctx)
        ctx.save_for_backward(
            dhidden,
            None if dweight is None else dweight.result().to(weight.dtype),
            None if dbias is None or bias is None else dbias.to(bias.dtype),
        )
        logprobs, clipped, kl = whole("logprobs"), whole("clipped"), whole("kl")
        entropy = whole("entropy") if with_entropy else None
        ctx.mark_non_differentiable(*(value for value in (logprobs, clipped, kl, entropy) if value is not None))
        return whole("losses").sum(), logprobs, clipped, kl, entropy

    @staticmethod
    @once_differentiable
    @in_context_of_forward
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        gradients = [None if saved is None else times_upstream(saved, grad_loss) for saved in ctx.saved_tensors]
        return (*gradients, *([None] * 6))


def contributing_rows(inputs: RowInputs, config: LossConfig, rows: int) -> torch.Tensor:
    """[n] int64 positions of the tokens whose loss can move: their number is read from the device."""
    used = inputs.weights != 0
    if config.beta == 0:
        advantages = inputs.advantages
        if isinstance(advantages, SegmentedAdvantages):
            advantages = advantages.per_token(rows)
        used = used & (advantages != 0)
    return used.nonzero()[:, 0]
