"""What the ways of a suite run: a model folder, and questions about pictures of a given size.

Nothing is downloaded. The shipped phantom policy is taken as it is; larger models get random weights and the phantom's
tokenizer, in which every further token is a made-up word, so that what they write has sentences a judge can be asked
about. In every folder completions end with a token that no trainer samples: all of them are cut at the same length.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from random_models import CONFIGS, build
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from mrpo.backbones import model_folder
from mrpo.data.phantom import PhantomDataset
from mrpo.records import Example

PHANTOM, BIG = "phantom policy", "Qwen3-VL-8B"
_SHIPPED = Path(model_folder("phantom"))
# One made-up word in so many ends a sentence.
_SENTENCE = 16
_MAX_POSITIONS = 8192
# The paper's longest prompt, and the most of it beside the picture.
LONGEST_PROMPT, LONGEST_TEXT = 1024, 240
# The largest picture of any suite.
_MAX_PIXELS = 1_048_576


def make_folder(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Writes a model folder that Transformers, vLLM and TRL read; one that is there already is left as it is."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _fill(name, partial, device, dtype)
    partial.rename(folder)


def _fill(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    for path in _SHIPPED.iterdir():
        if path.name != "model.safetensors" or name == PHANTOM:
            shutil.copyfile(path, folder / path.name)
    if name != PHANTOM:
        _make_random(name, folder, device, dtype)
    config = AutoConfig.from_pretrained(folder)
    options = json.loads((folder / "preprocessor_config.json").read_text())
    vision = config.vision_config
    options |= {"patch_size": vision.patch_size, "size": {"shortest_edge": 256, "longest_edge": _MAX_PIXELS}}
    (folder / "preprocessor_config.json").write_text(json.dumps(options, indent=2))
    if find_spec("torchvision") is not None:
        _write_processor(folder, vision)
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    endings = {"eos_token_id": config.video_token_id, "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(endings, indent=2))


def _make_random(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    shipped, config = AutoConfig.from_pretrained(_SHIPPED), CONFIGS[name]()
    for token in ("image", "video", "vision_start", "vision_end"):
        setattr(config, f"{token}_token_id", getattr(shipped, f"{token}_token_id"))
    config.text_config.pad_token_id = shipped.text_config.pad_token_id
    config.text_config.eos_token_id = shipped.text_config.eos_token_id
    config.text_config.max_position_embeddings = _MAX_POSITIONS
    build(config, device, dtype).save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    # Tokens outside the vocabulary would be numbered anew, behind it.
    words |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    taken = {*words.values()}
    for number in range(config.text_config.vocab_size):
        if number not in taken:
            # "Ġ" is byte-level BPE's space.
            words[f"Ġw{number}{'.' if number % _SENTENCE == 0 else ''}"] = number
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _write_processor(folder: Path, vision: Any) -> None:
    """Transformers' own processor of the family, which vLLM and TRL ask for."""
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
    Qwen3VLProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=Qwen3VLVideoProcessor(merge_size=vision.spatial_merge_size, **sizes),
        chat_template=(folder / "chat_template.jinja").read_text(),
    ).save_pretrained(folder)


def picture_side(folder: Path, image_tokens: int) -> int:
    """Pixels of the side of a square picture of the nearest number of image tokens."""
    vision = AutoConfig.from_pretrained(folder).vision_config
    return max(2, round(math.sqrt(image_tokens))) * vision.patch_size * vision.spatial_merge_size


def examples(folder: Path, prompts: int, image_tokens: int, first: int = 0) -> list[Example]:
    """Phantom questions from number `first` on, their pictures scaled to the nearest number of image tokens."""
    side = picture_side(folder, image_tokens)
    found = []
    for example in PhantomDataset("train", size=first + prompts)[first:]:
        (picture,) = example.load_images()
        found.append(replace(example, images=(picture.resize((side, side), Image.Resampling.NEAREST),)))
    return found
