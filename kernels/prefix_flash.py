"""Packed-row attention out of two variable-length flash-attention calls, joined by their log-sum-exps.

The first call sees every part causally by itself, the second the completions against their prompts. With o_i and l_i
their outputs and log-sum-exps, l = logaddexp(l_1, l_2) and o = sum of exp(l_i - l) o_i is attention over both sets of
keys. The backward pass of flash attention recomputes probabilities as exp(score - l) and needs sum(do * o): given the
*joined* o and l, each call returns its share of the exact gradient, and the shares add up.

What a primitive must do is little and written in `VarlenAttention`, so that the joining and the backward pass are
tested in fp64 on the CPU with a plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from .prefix_layout import FlashSpans, Spans


class VarlenAttention(Protocol):
    """Attention of stretches of queries, (T, Hq, D), to stretches of keys and values, (T, Hkv, D).

    Queries without keys get 0, a log-sum-exp of any value, and the gradient 0; so do keys without queries.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output, (T, Hq, D), and log-sum-exp, (Hq, T) in fp32 or wider. `causal` is for spans of equal lengths."""
        ...

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v through the probabilities exp(score - lse), each in new memory."""
        ...


def flash_prefix_attention(
    q: torch.Tensor,  # [1, Hq, L, D]
    k: torch.Tensor,  # [1, Hkv, L, D]
    v: torch.Tensor,  # [1, Hkv, L, D]
    spans: FlashSpans,
    scale: float,
) -> torch.Tensor:
    """See `prefix_attention`. An operator of its own, so that a compiled layer stays one graph."""
    tokens_first = (tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v))
    out, _ = joined_attention(*tokens_first, *spans, True, scale)
    return out.transpose(0, 1)[None]


def takes_flash(device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether flash attention serves queries of this kind, on a GPU of sm_80 or later."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


@torch.library.custom_op("mrpo::prefix_flash_attention", mutates_args=())
def joined_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    has_prefix: torch.Tensor,
    longest: Sequence[int],
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, [L, Hq, D], and log-sum-exp, [Hq, L], of tokens-first q, k and v; the spans are those of `FlashSpans`.

    `causal`: whether a token sees only what stands before it in its own part.
    """
    primitive = default_primitive()
    own_spans, prefix_spans = _pair(own, queries, keys, longest)
    out, lse = primitive.forward(q, k, v, own_spans, causal=causal, scale=scale)
    if prefix_spans is not None:
        out, lse = join(out, lse, *primitive.forward(q, k, v, prefix_spans, causal=False, scale=scale), has_prefix)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("mrpo::prefix_flash_attention_backward", mutates_args=())
def joined_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    own: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    longest: Sequence[int],
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v: the shares of both calls, added up."""
    primitive, saved = default_primitive(), (grad_out.contiguous(), q, k, v, out, lse)
    own_spans, prefix_spans = _pair(own, queries, keys, longest)
    dq, dk, dv = primitive.backward(*saved, own_spans, causal=causal, scale=scale)
    if prefix_spans is not None:
        for total, share in zip(
            (dq, dk, dv), primitive.backward(*saved, prefix_spans, causal=False, scale=scale), strict=True
        ):
            total.add_(share)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@joined_attention.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


@joined_attention_backward.register_fake
def _(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, own, queries, keys, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, own, queries, keys)


def _backward(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    gradients = joined_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*gradients, *([None] * 7))


joined_attention.register_autograd(_backward, setup_context=_save)


def _pair(
    own: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, longest: Sequence[int]
) -> tuple[Spans, Spans | None]:
    own_spans = Spans(own, own, longest[0], longest[0])
    return own_spans, Spans(queries, keys, longest[1], longest[2]) if queries.numel() else None


def join(
    own: torch.Tensor,  # [T, Hq, D]
    own_lse: torch.Tensor,  # [Hq, T]
    prefix: torch.Tensor,  # [T, Hq, D]
    prefix_lse: torch.Tensor,  # [Hq, T]
    has_prefix: torch.Tensor,  # [T] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp over both sets of keys. Kernels give +inf or -inf for no keys, so `has_prefix` decides.

    `own` and `own_lse` may be overwritten.
    """
    in_one_layout = all(tensor.is_contiguous() for tensor in (own, own_lse, prefix, prefix_lse))
    if own.is_cuda and in_one_layout and find_spec("triton") is not None:
        from .prefix_join_triton import join_in_place

        return join_in_place(own, own_lse, prefix, prefix_lse, has_prefix)
    prefix_lse = prefix_lse.masked_fill(~has_prefix, float("-inf"))
    lse = torch.logaddexp(own_lse, prefix_lse)
    share = (prefix_lse - lse).exp_().t()[..., None]
    joined = torch.lerp(own.to(share.dtype), prefix.to(share.dtype), share)
    return joined.to(own.dtype), lse


@lru_cache(maxsize=1)
def default_primitive() -> VarlenAttention:
    """flash-attn where it is installed, else PyTorch's own."""
    # The package of version 4 has the name, but not this interface.
    installed = find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None
    return FlashAttnPackage() if installed else TorchFlash()


class TorchFlash:
    """The kernels inside PyTorch: fp16 and bf16, head size a multiple of 8 up to 256, sm_80 or later."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = (spans.queries, spans.keys, spans.max_queries, spans.max_keys)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = (spans.queries, spans.keys, spans.max_queries, spans.max_keys)
        # No dropout: the random state is not looked at, as in torch.nn.attention.varlen.
        random_state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, *sizes, 0.0, causal, random_state, unused, scale=scale
        )


class FlashAttnPackage:
    """The same kernels, newer, from the flash-attn package (2.7 or later)."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, *, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        sizes = (spans.queries, spans.keys, spans.max_queries, spans.max_keys)
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, *sizes, dropout_p=0.0, softmax_scale=scale, causal=causal)
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        sizes = (spans.queries, spans.keys, spans.max_queries, spans.max_keys)
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        _flash_attn_varlen_backward(
            *(grad_out, q, k, v, out, lse),
            *gradients,
            *sizes,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients
