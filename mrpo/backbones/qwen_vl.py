"""The Qwen vision-language families: Qwen2.5-VL and Qwen3-VL.

Images of any size become patches; a `merge_size` x `merge_size` block of patches is one image token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from mrpo.backbones.base import ImageFeatures
from mrpo.records import EncodedPrompt


class QwenVL:
    """What both families share."""

    vision_modules: ClassVar[tuple[str, ...]] = ("visual",)
    ragged_vision: ClassVar[bool] = True
    max_aspect_ratio: ClassVar[float] = 200.0  # above it transformers' `smart_resize` refuses

    def process_images(
        self, image_processor: Any, images: Sequence[Image.Image], config: Any
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        if not images:
            return {}, []
        features = image_processor(images=list(images), return_tensors="pt")
        grid = features["image_grid_thw"]
        counts = (grid.prod(dim=1) // image_processor.merge_size**2).tolist()
        return {"pixel_values": features["pixel_values"], "image_grid_thw": grid}, counts

    def count_image_tokens(self, image_processor: Any, width: int, height: int, config: Any) -> int:
        return image_processor.get_number_of_image_patches(height, width) // image_processor.merge_size**2

    def processor_options(self, image_processor: Any) -> dict[str, Any]:
        return {}

    def placeholder(self, num_tokens: int) -> tuple[str, str]:
        return "<|image_pad|>", "<|image_pad|>" * num_tokens

    def forward_inputs(self, token_type_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": token_type_ids}

    def prompt_positions(self, core: Any, prompt: EncodedPrompt) -> torch.Tensor:
        positions, _ = core.get_rope_index(
            prompt.input_ids[None],
            mm_token_type_ids=prompt.token_type_ids[None],
            image_grid_thw=prompt.images.get("image_grid_thw"),
        )
        return positions[:, 0]

    def vision_plan(self, core: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        grids = _grids(prompts)
        lengths = [height * width for frames, height, width in grids.tolist() for _ in range(frames)]
        return {
            "position_ids": get_vision_position_ids(grids, core.visual.spatial_merge_size),
            "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            "max_seqlen": max(lengths),
        }

    def image_features(self, core: Any, images: Mapping[str, torch.Tensor], plan: Mapping[str, Any]) -> ImageFeatures:
        tower, pixels, grid = core.visual, images["pixel_values"], images["image_grid_thw"]
        features = tower(pixels.type(tower.dtype), grid_thw=grid, return_dict=True, **plan)
        return ImageFeatures(features.pooler_output, tuple(getattr(features, "deepstack_features", None) or ()))

    def blank_image(self, config: Any) -> tuple[dict[str, torch.Tensor], int]:
        vision = config.vision_config
        side = vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(side * side, values), "image_grid_thw": torch.tensor([[1, side, side]])}, 1


class Qwen25VL(QwenVL):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    think_tag: ClassVar[str] = "think"

    def vision_plan(self, core: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        tower = core.visual
        sizes = tower.spatial_merge_size, tower.window_size, tower.patch_size
        order, starts = get_vision_window_index(_grids(prompts), *sizes)
        windows = {"window_index": order, "cu_window_seqlens": starts, "max_window_seqlen": int(starts.diff().max())}
        return super().vision_plan(core, prompts) | windows


class Qwen3VL(QwenVL):
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    think_tag: ClassVar[str] = "thinking"

    def vision_plan(self, core: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        tower = core.visual
        table = tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners
        images = [_interpolation(*grid, *table, tower.spatial_merge_size) for grid in _grids(prompts).tolist()]
        indices, weights = (torch.cat(parts) for parts in zip(*images, strict=True))
        return super().vision_plan(core, prompts) | {"interp_indices": indices, "interp_weights": weights}


def _grids(prompts: Sequence[EncodedPrompt]) -> torch.Tensor:
    """(images, 3): frames, and patches along the height and the width of each."""
    return torch.cat([prompt.images["image_grid_thw"] for prompt in prompts if prompt.images])


@lru_cache(maxsize=256)
def _interpolation(
    frames: int, height: int, width: int, side: int, mode: str, align_corners: bool, merge_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(patches, taps) places in the (side, side) table of positions, and their weights, for one image.

    It is kept, some 48 bytes a patch: a hundred small operations whose result depends on the image's size alone.
    """
    return get_vision_interpolation_indices_and_weights(
        torch.tensor([[frames, height, width]]),
        side,
        mode=mode,
        align_corners=align_corners,
        spatial_merge_size=merge_size,
    )
