"""Tiny models that vLLM's CPU build takes, too: head sizes of 32, and what its own processors look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import build_tiny_model

_SECTIONS = {"qwen2_5_vl": [4, 6, 6], "qwen3_vl": [6, 5, 5]}
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<thinking>",  # never in a prompt; vLLM 0.24 takes it for a regular expression
}


def build_engine_model(family: str, folder: Path, **text_options: Any) -> Path:
    """Writes a random model of `family` to `folder`; see `build_tiny_model`."""
    options: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family in _SECTIONS:
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _SECTIONS[family]}
    if family == "qwen3_vl":
        options["head_dim"] = 32
        options["rope_parameters"]["mrope_interleaved"] = True
    build_tiny_model(family, folder, **options | text_options)
    if family == "internvl":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": _INTERNVL_TOKENS}))
        tokens = json.loads((folder / "config.json").read_text())["image_seq_length"]
        processor = {"processor_class": "InternVLProcessor", "image_seq_length": tokens}
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
