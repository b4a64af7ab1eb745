"""InternVL3 (the transformers-native classes): images become square tiles of a fixed number of tokens each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from mrpo.backbones.base import ImageFeatures
from mrpo.records import EncodedPrompt


class InternVL:
    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    think_tag: ClassVar[str] = "think"
    vision_modules: ClassVar[tuple[str, ...]] = ("vision_tower", "multi_modal_projector")
    ragged_vision: ClassVar[bool] = False
    max_aspect_ratio: ClassVar[float] = math.inf

    def process_images(
        self, image_processor: Any, images: Sequence[Image.Image], config: Any
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        if not images:
            return {}, []
        features = image_processor(images=list(images), return_tensors="pt")
        tiles = torch.as_tensor(features["num_patches"]).tolist()
        return {"pixel_values": features["pixel_values"]}, [n * config.image_seq_length for n in tiles]

    def count_image_tokens(self, image_processor: Any, width: int, height: int, config: Any) -> int:
        return image_processor.get_number_of_image_patches(height, width) * config.image_seq_length

    def processor_options(self, image_processor: Any) -> dict[str, Any]:
        # InternVLProcessor cuts images into tiles whatever the checkpoint says.
        return {"crop_to_patches": image_processor.crop_to_patches}

    def placeholder(self, num_tokens: int) -> tuple[str, str]:
        return "<IMG_CONTEXT>", f"<img>{'<IMG_CONTEXT>' * num_tokens}</img>"

    def forward_inputs(self, token_type_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def prompt_positions(self, core: Any, prompt: EncodedPrompt) -> torch.Tensor:
        return torch.arange(len(prompt.input_ids))[None]

    def vision_plan(self, core: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        return {}

    def image_features(self, core: Any, images: Mapping[str, torch.Tensor], plan: Mapping[str, Any]) -> ImageFeatures:
        return ImageFeatures(core.get_image_features(**images, return_dict=True).pooler_output.flatten(0, 1))

    def blank_image(self, config: Any) -> tuple[dict[str, torch.Tensor], int]:
        vision = config.vision_config
        return {"pixel_values": torch.zeros(1, vision.num_channels, *vision.image_size)}, config.image_seq_length
