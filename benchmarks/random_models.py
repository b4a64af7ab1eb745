"""The three backbones at their real sizes, and a small one, with random weights; and prompts for them.

Nothing is downloaded, and weights are made where they are used: 8 billion of them are there in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)
from transformers.initialization import no_init_weights

from mrpo.backbones import Processor, find_family
from mrpo.records import EncodedPrompt


def _qwen3_vl_8b() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = _text(4096, 12_288, 36, 32, 8, 151_936) | {"head_dim": 128, "rope_parameters": rope}
    vision: dict[str, Any] = {
        "depth": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
    }
    vision |= {"deepstack_visual_indexes": [8, 16, 24], "num_position_embeddings": 2304}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _qwen2_5_vl_7b() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = _text(3584, 18_944, 28, 28, 4, 152_064) | {"rope_parameters": rope}
    vision: dict[str, Any] = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
    }
    vision |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14}
    ids = _ids(image=151_655, video=151_656, vision_start=151_652, vision_end=151_653)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def _internvl3_8b() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    text = _text(3584, 18_944, 28, 28, 4, 151_674) | {"model_type": "qwen2", "rope_parameters": rope}
    vision: dict[str, Any] = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    vision |= {"image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
    return InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=151_667, image_seq_length=256, tie_word_embeddings=False
    )


def _small_qwen3_vl() -> PreTrainedConfig:
    """For CPUs: products large enough to matter, a head that weighs as much as beside 8 billion parameters."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    text = _text(256, 768, 4, 4, 2, 8192) | {"head_dim": 64, "rope_parameters": rope}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "intermediate_size": 256,
        "out_hidden_size": 256,
    }
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 256, "patch_size": 8}
    ids: dict[str, Any] = {
        "image_token_id": 8188,
        "video_token_id": 8189,
        "vision_start_token_id": 8190,
        "vision_end_token_id": 8191,
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}


def _vision(out: int, **options: Any) -> dict[str, Any]:
    return {"out_hidden_size": out, **options}


def _ids(**tokens: int) -> dict[str, Any]:
    return {f"{name}_token_id": token for name, token in tokens.items()}


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3-VL-8B": _qwen3_vl_8b,
    "Qwen2.5-VL-7B": _qwen2_5_vl_7b,
    "InternVL3-8B": _internvl3_8b,
    "small Qwen3-VL": _small_qwen3_vl,
}


def build(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in training mode; matrices N(0, 0.02), scales 1, biases 0."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                # InternVL scales the layers of its vision tower by what it calls lambda.
                parameter.fill_(1.0 if name.endswith("weight") or "lambda" in name else 0.0)
    model.config.use_cache = False
    return model.train()


def processor_of(model: Any) -> Processor:
    """What batches are made with; there is no tokenizer and no image."""
    family = find_family(model.config.model_type, "random weights")
    return cast(Processor, SimpleNamespace(family=family, tokenizer=SimpleNamespace(pad_token_id=0)))


def image_tokens_of(config: PreTrainedConfig, wanted: int) -> int:
    """The nearest number of image tokens that an image of this family can have."""
    if config.model_type == "internvl":
        return max(1, round(wanted / config.image_seq_length)) * config.image_seq_length
    return max(1, round(math.sqrt(wanted))) ** 2


def make_prompt(
    config: PreTrainedConfig, image_tokens: int, text_tokens: int, generator: torch.Generator
) -> EncodedPrompt:
    """A prompt of random text around one image of noise."""
    vocab = config.get_text_config().vocab_size
    text = torch.randint(1, vocab * 9 // 10, (text_tokens,), generator=generator)
    half, image = text_tokens // 2, torch.full((image_tokens,), config.image_token_id)
    if config.model_type != "internvl":
        image = torch.tensor([config.vision_start_token_id, *image.tolist(), config.vision_end_token_id])
    input_ids = torch.cat([text[:half], image, text[half:]])
    images = _images(config, image_tokens, generator)
    return EncodedPrompt(input_ids, (input_ids == config.image_token_id).long(), images, (), ())


def _images(config: PreTrainedConfig, image_tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    if config.model_type == "internvl":
        tiles = image_tokens // config.image_seq_length
        return {"pixel_values": torch.randn(tiles, 3, *vision.image_size, generator=generator)}
    side = math.isqrt(image_tokens) * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(side * side, values, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
