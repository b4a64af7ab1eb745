"""A random model of each family, small enough for a test, in an ordinary Hugging Face folder.

Weights are drawn so that every layer matters: with transformers' own initial weights tiny models hardly look at their
input, and errors would hide. Qwen2.5-VL attends in windows in its vision tower, Qwen3-VL hands deepstack features to
the language model, InternVL cuts images into tiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from mrpo.backbones.tiny import build_tokenizer

TINY_FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl")

WORDS = "question image lung heart left right normal effusion one two three yes no . ? what where is the a in of"
PATCH, TILE = 8, 32


def build_tiny_model(family: str, folder: Path, *, seed: int = 0, **text_options: Any) -> Path:
    """Writes a random model of `family` with tokenizer, chat template and image processor to `folder`.

    Args:
        text_options: fields of the text config to set otherwise, as `tie_word_embeddings`, `num_hidden_layers`.
    """
    tokenizer = _tokenizer(family)
    config = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "internvl": _internvl}[family](tokenizer, text_options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        _randomize(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _image_processor(family).save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    """Matrices that keep the size of what they multiply, scales around 1, other vectors around 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel() if "embed" not in name else parameter.shape[-1]
            parameter.normal_(0.0, fan_in**-0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.normal_(1.0, 0.1)
        else:
            parameter.normal_(0.0, 0.3)


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer([WORDS])
    if family == "internvl":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<IMG_CONTEXT>"]})
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n"
        )
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }


def _vision(**options: Any) -> dict[str, Any]:
    return {"depth": 3, "hidden_size": 48, "intermediate_size": 64, "num_heads": 3, "patch_size": PATCH} | options


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = _text(tokenizer, {"rope_parameters": rope} | options)
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=_vision(out_hidden_size=text["hidden_size"], window_size=4 * PATCH, fullatt_block_indexes=[1]),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **_qwen_ids(tokenizer),
    )


def _qwen3_vl(tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = _text(tokenizer, {"head_dim": 16, "rope_parameters": rope} | options)
    return Qwen3VLConfig(
        text_config=text,
        vision_config=_vision(
            out_hidden_size=text["hidden_size"], num_position_embeddings=64, deepstack_visual_indexes=[0, 1]
        ),
        tie_word_embeddings=text.get("tie_word_embeddings", False),
        **_qwen_ids(tokenizer),
    )


def _internvl(tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> InternVLConfig:
    text = _text(tokenizer, {"model_type": "qwen2"} | options)
    return InternVLConfig(
        text_config=text,
        vision_config={
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 64,
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
            "attention_bias": True,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )


def _image_processor(family: str) -> Any:
    if family == "internvl":
        size = {"height": TILE, "width": TILE}
        return GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (12 * PATCH) ** 2},
        patch_size=PATCH,
        temporal_patch_size=2,
        merge_size=2,
    )
