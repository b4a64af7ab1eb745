"""Our attention under transformers' own attention layers.

A language model whose config names `mrpo_prefix` follows a layout in calls that bring `prefix_arguments`, and runs SDPA
in all others: dense rows and generation. The arguments travel by keyword through every layer, so that gradient
checkpointing, which calls layers again, brings them along; they hold nothing on which a compiled layer would depend.

A vision tower whose config names `mrpo_flash_segments` computes all images, or all windows of them, in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mrpo.kernels.prefix_attention import (
    AttentionName,
    GroupMasks,
    choose_attention,
    flex_prefix_attention,
    sdpa_prefix_attention,
)
from mrpo.kernels.prefix_flash import FlashSpans, flash_prefix_attention, takes_flash
from mrpo.kernels.prefix_layout import PrefixLayout
from mrpo.kernels.segment_attention import attend_segments

NAME = "mrpo_prefix"
# Towers pass on where images begin only to what has "flash" in its name; others they call once an image.
SEGMENTS = "mrpo_flash_segments"


def prefix_arguments(layout: PrefixLayout, implementation: AttentionName | None = None) -> dict[str, Any]:
    """Keyword arguments of a language model's forward that make its attention follow `layout`.

    transformers builds no mask of its own where a four-dimensional one is given, even if it is an empty stand-in.
    """
    name = implementation or choose_attention(layout.device)
    if name == "flex":
        return {"attention_mask": layout.block_mask(), "prefix_attention": name}
    if name == "sdpa" and layout.device.type != "cpu":
        return {"attention_mask": layout.mask[None, None], "prefix_attention": name}
    stand_in = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=layout.device)
    if name == "sdpa":  # a loop over groups, which a compiler would unroll anew for every row
        return {"attention_mask": stand_in, "prefix_attention": name, "prefix_masks": layout.group_masks}
    return {"attention_mask": stand_in, "prefix_attention": name, "prefix_spans": layout.flash_spans}


def use_prefix_attention(model: Any) -> None:
    """Makes the language model in `model` take `prefix_arguments`; its vision tower stays as it is."""
    model.set_attn_implementation({"text_config": NAME})


def serves_segments() -> bool:
    """Whether vision towers can take all images in one call here: not on GPUs that are too old for flash attention."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def use_segment_attention(model: Any) -> None:
    """Makes the vision tower in `model`, which takes images of all sizes one behind the other, compute them at once."""
    # Not by set_attn_implementation: for such names it looks for the flash-attn package.
    model.config.vision_config._attn_implementation = SEGMENTS


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    prefix_attention: AttentionName | None = None,
    prefix_spans: FlashSpans | None = None,
    prefix_masks: GroupMasks | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers wants it: q (B, Hq, L, D), k and v (B, Hkv, L, D) -> (B, L, Hq, D).

    Raises:
        ValueError: a packed row meets a layer with attention dropout or a sliding window.
    """
    if prefix_attention is not None and (kwargs.get("dropout") or kwargs.get("sliding_window") is not None):
        raise ValueError("packed rows know neither attention dropout nor sliding windows: set update.packing=dense")
    if prefix_attention is None and query.shape[2] == 1 and query.shape[1] > key.shape[1]:
        return _decode(query, key, value, attention_mask, kwargs.get("scaling")), None
    if prefix_attention is None or (prefix_attention == "sdpa" and prefix_masks is None):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if prefix_masks is not None:
        out = sdpa_prefix_attention(query, key, value, prefix_masks, scale)
    elif prefix_spans is not None:
        out = flash_prefix_attention(query, key, value, prefix_spans, scale)
    else:
        out = flex_prefix_attention(query, key, value, attention_mask, scale)
    return out.transpose(1, 2), None


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """(B, 1, Hq, D) of q (B, Hq, 1, D): heads that share keys are rows of one head, so that no keys are copied.

    transformers 5.23 does so itself; earlier ones repeat the keys.
    """
    batch, heads, _, width = query.shape
    grouped = query.view(batch, key.shape[1], -1, width)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, width)


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as the towers want it: q, k and v (1, H, T, D) -> (1, T, H, D)."""
    tokens_first = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    flash = takes_flash(query.device, query.shape[-1], query.dtype)
    return attend_segments(*tokens_first, cu_seq_lens_q, max_length_q, scaling, flash=flash)[None], None


AttentionInterface.register(NAME, attention)
AttentionInterface.register(SEGMENTS, vision_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
