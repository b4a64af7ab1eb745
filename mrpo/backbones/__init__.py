"""Model families: the checkpoint's config says which one it is, never its path."""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mrpo.backbones.base import EncodedPrompt, Family, Processor, batch_images, to_device
from mrpo.backbones.internvl import InternVL
from mrpo.backbones.liger import require_liger
from mrpo.backbones.lora import add_adapters, require_peft
from mrpo.backbones.patches import embed_patches_by_product
from mrpo.backbones.qwen_vl import Qwen3VL, Qwen25VL
from mrpo.config import Config, ModelConfig, Positive
from mrpo.errors import UserError

__all__ = [
    "EncodedPrompt",
    "Family",
    "Processor",
    "PromptStyle",
    "batch_images",
    "check_model",
    "load_model",
    "load_processor",
    "make_trainable",
    "read_prompt_style",
    "to_device",
    "write_prompt_style",
]

FAMILIES: tuple[type[Family], ...] = (Qwen25VL, Qwen3VL, InternVL)

PROMPT_FILE = "mrpo_prompt.json"
INSTRUCTION = (
    "Think step by step inside <{tag}> and </{tag}>, one finding per sentence, "
    "then give the final answer inside <answer> and </answer>."
)


def model_folder(path: str) -> str:
    """The folder or hub id that `model.path` names; `phantom` is the policy that ships with the package."""
    if path != "phantom":
        return path
    return str(files("mrpo") / "assets" / "phantom")


def load_processor(config: Config) -> Processor:
    """Tokenizer, image processor and family of `config.model.path`; reads no weights.

    Raises:
        UserError: the folder lacks a file, or its family is not known.
    """
    folder = model_folder(config.model.path)
    _check_folder(config.model.path, Path(folder))
    options: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(folder, **options)
        family = find_family(model_config.model_type, config.model.path)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        backend = image_backend(config.rollout.engine)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path={config.model.path} cannot be loaded: {error}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"model.path={config.model.path} has no chat template (chat_template.jinja)")
    own = read_prompt_style(config.model.path)
    think_tag = config.model.think_tag or own.think_tag or family.think_tag
    instruction = config.prompt.instruction
    if instruction is None:
        instruction = INSTRUCTION.format(tag=think_tag) if own.instruction is None else own.instruction
    return Processor(
        family=family,
        tokenizer=tokenizer,
        image_processor=image_processor,
        model_config=model_config,
        think_tag=think_tag,
        instruction=instruction,
        max_prompt_tokens=config.prompt.max_tokens,
        max_image_pixels=config.data.max_image_pixels,
        image_dtype=getattr(torch, config.model.dtype),
    )


def image_backend(engine: str) -> str:
    """How images are resized: as vLLM does where it samples, which takes torchvision; else in plain PIL.

    The two differ by a grey level here and there, so that the sampler would see other images than the trainer.
    """
    return "torchvision" if engine.startswith("vllm") and importlib.util.find_spec("torchvision") else "pil"


class PromptStyle(BaseModel, frozen=True, strict=True):
    """How a policy was asked in training, as far as its folder says; None: it does not say.

    `max_prompt_tokens` and `max_image_pixels` are the run's prompt.max_tokens and data.max_image_pixels.
    """

    think_tag: str | None = None
    instruction: str | None = None
    max_prompt_tokens: Positive | None = None
    max_image_pixels: Positive | None = None


def write_prompt_style(folder: Path, processor: Processor) -> None:
    """Leaves beside an exported policy how it was asked in training."""
    style = PromptStyle(
        think_tag=processor.think_tag,
        instruction=processor.instruction,
        max_prompt_tokens=processor.max_prompt_tokens,
        max_image_pixels=processor.max_image_pixels,
    )
    (folder / PROMPT_FILE).write_text(style.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_prompt_style(model_path: str) -> PromptStyle:
    """What `write_prompt_style` left in the folder of `model.path`; empty for other models.

    Raises:
        UserError: the file is there and says something else.
    """
    path = Path(model_folder(model_path)) / PROMPT_FILE
    if not path.is_file():
        return PromptStyle()
    try:
        return PromptStyle.model_validate_json(path.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['input']!r}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path} must say how the policy is asked, as a run writes it: {wrong.strip()}") from error


def find_family(model_type: str, path: str) -> Family:
    """The family whose checkpoints say `model_type`."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family()
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"model.path={path} is of the family {model_type!r}; known families: {', '.join(known)}")


def check_model(config: ModelConfig) -> None:
    """Refuses a policy that `load_model` cannot load, as far as it can be told without reading weights.

    Raises:
        UserError: a local folder has no weights in safetensors format, or a package is missing.
    """
    folder = Path(model_folder(config.path))
    if folder.is_dir() and not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        raise UserError(
            f"model.path={config.path} has no weights: expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} "
            "(files that unpickle when they are loaded are not read)"
        )
    require_peft(config)
    require_liger(config, on_gpu=torch.cuda.is_available())


def load_model(config: ModelConfig) -> Any:
    """The policy's weights (safetensors only) in `config.dtype`: vision tower frozen, adapters added if asked.

    Raises:
        UserError: the family is not known, the weights cannot be read, or adapters are asked for without the peft
            package.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_folder(config.path),
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights of model.path={config.path} cannot be loaded: {error}") from error
    embed_patches_by_product(model)
    make_trainable(model, config, find_family(model.config.model_type, config.path))
    return model


def make_trainable(model: Any, config: ModelConfig, family: Family) -> None:
    """Freezes what is not to be trained, and adds adapters if asked.

    Raises:
        UserError: adapters cannot be added; see `add_adapters`.
    """
    if config.freeze_vision:
        for name in family.vision_modules:
            getattr(model.model, name).requires_grad_(False)
    if config.lora_rank:
        add_adapters(model, config, family.vision_modules)


def _check_folder(path: str, folder: Path) -> None:
    """Names what is missing in a local folder; a hub id is left to the hub client."""
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path == "phantom":
            raise UserError(f"model.path={path}: there is no such folder")
        return
    for need, names in {
        "config": ["config.json"],
        "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
        "image processor": ["preprocessor_config.json", "processor_config.json"],
    }.items():
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"model.path={path} has no {need}: expected {' or '.join(names)}")
