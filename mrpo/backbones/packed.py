"""The forward pass of a packed row: every prompt and its images once, every completion behind its own prompt.

What a completion's token computes is what it would compute in a row `[prompt, completion]` of its own: it sees that
prompt and its own completion, and its positions go on behind the prompt's largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from mrpo.backbones.attention import prefix_arguments, serves_segments, use_prefix_attention, use_segment_attention
from mrpo.backbones.base import Family
from mrpo.kernels.prefix_attention import AttentionName, PrefixLayout


@dataclass(frozen=True)
class PackedRow:
    """One row of L tokens: groups one after the other, then padding.

    input_ids: (1, L); position_ids: (A, 1, L), on the A axes of the family's rotary embedding; images: the vision
    tower's inputs of all prompts, in order; vision_plan: what it makes of their sizes; image_places: (n,) int64, where
    in the row their n tokens stand.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PrefixLayout
    images: Mapping[str, torch.Tensor]
    vision_plan: Mapping[str, Any]
    image_places: torch.Tensor


def use_packed_rows(model: Any, family: Family) -> None:
    """Makes both towers of `model` take packed rows; its dense rows and generation give the numbers they gave."""
    use_prefix_attention(model)
    if family.ragged_vision and serves_segments():
        use_segment_attention(model)
    text = model.model.language_model
    if hasattr(text, "_deepstack_process"):
        text._deepstack_process = MethodType(_add_deepstack, text)


def _add_deepstack(self: Any, hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Adds (n, H) `features` to (1, L, H) `hidden` at (n,) `places`, or where a mask says, which is read back."""
    if places.dtype == torch.bool:
        return type(self)._deepstack_process(self, hidden, places, features)
    return hidden.index_add(1, places, features[None].to(hidden.dtype))


def packed_hidden(
    family: Family, core: Any, row: PackedRow, implementation: AttentionName | None = None
) -> torch.Tensor:
    """(L, H) last hidden states of `row`, normed, under `core`, the `model` of a Hugging Face vision-language model.

    Images run through the vision tower in one call, and their features are put in place once.
    """
    embedded = core.get_input_embeddings()(row.input_ids)
    deepstack: dict[str, Any] = {}
    if row.images:
        features = family.image_features(core, row.images, row.vision_plan)
        embedded = embedded.index_copy(1, row.image_places, features.embeddings[None].to(embedded.dtype))
        if features.deepstack:
            deepstack = {"visual_pos_masks": row.image_places, "deepstack_visual_embeds": features.deepstack}
    axes = row.position_ids
    output = core.language_model(
        inputs_embeds=embedded,
        position_ids=axes if len(axes) > 1 else axes[0],
        use_cache=False,
        **deepstack,
        **prefix_arguments(row.layout, implementation),
    )
    return output.last_hidden_state[0]
