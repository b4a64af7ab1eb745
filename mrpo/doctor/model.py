"""The model that a configuration names: whether it can be loaded whole, and how large it is, without its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageTextToText

from mrpo.backbones import Processor, find_family, load_processor, make_trainable, model_folder
from mrpo.config import Config
from mrpo.doctor.check import Check, first_line
from mrpo.doctor.memory import ModelSize, size_of
from mrpo.errors import UserError

HUB_PATIENCE = 5.0  # seconds until a hub that says nothing counts as unreachable
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Model:
    """A model that can be loaded: from which folder or hub id, and its size."""

    source: str
    processor: Processor
    size: ModelSize


def read_model(config: Config) -> Model:
    """Tokenizer, image processor and size of `config.model.path`, without its weights.

    Raises:
        UserError: something is missing in the folder, its family is not known, or the hub does not give it.
    """
    source = find_source("model.path", config.model.path)
    found = config.model_copy(update={"model": config.model.model_copy(update={"path": source})})
    processor = load_processor(found)
    return Model(source, processor, read_size(found, processor.model_config))


def find_source(key: str, path: str) -> str:
    """From where to load `path`: a folder as it is, a model of the hub from the cache, else from the hub.

    The hub is asked once, as loading itself tries for half a minute where there is no network.

    Raises:
        UserError: the model is not in the cache, and the hub does not give it.
    """
    if get_model(path) is None:
        return path
    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return str(Path(cached).parent)
    try:
        HfApi().model_info(path, timeout=HUB_PATIENCE)
    except Exception as error:  # those of the HTTP library beneath, which differ between versions of the hub's client
        raise UserError(
            f"{key}={path} is neither a folder nor in the hub's cache, and the hub does not give it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return path


def read_size(config: Config, model_config: Any) -> ModelSize:
    """Counts parameters on PyTorch's meta device, which takes no memory.

    Raises:
        UserError: adapters are asked for that the model cannot have, or without the peft package.
    """
    family = find_family(model_config.model_type, config.model.path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config, trust_remote_code=config.model.trust_remote_code)
        make_trainable(model, config.model, family)
    return size_of(model)


def check_model(config: Config, model: Model) -> Check:
    """Whether the policy's weights are there, all of them and whole."""
    family, size = model.processor.model_config.model_type, model.size.parameters
    fact = f"{config.model.path}: {family}, {size:,} parameters"
    return _check_weights("model", config.model.path, model.source, fact)


def check_bertscore(config: Config) -> Check:
    """Whether the encoder of the answer reward is there."""
    path = str(config.reward.bertscore_model)
    source = find_source("reward.bertscore_model", path)
    try:
        encoder = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"reward.bertscore_model={path} cannot be loaded: {error}") from error
    return _check_weights("BERTScore", path, source, f"{path}: {encoder.model_type}")


def _check_weights(name: str, path: str, source: str, fact: str) -> Check:
    fetch, folder = get_model(path), Path(model_folder(source))
    problems = weight_problems(folder) if folder.is_dir() else ["no weights"]
    if not problems:
        return Check(name, "ok", f"{fact}, in the hub's cache" if fetch else fact)
    if fetch:
        return Check(name, "warning", f"{fact}; its weights are not here yet, a run downloads them", fetch)
    return Check(name, "missing", f"{path}: {'; '.join(problems)}", f"copy the checkpoint to {path} again")


def get_model(path: str) -> str | None:
    """The command that fetches a model from the hub, None for a folder."""
    is_folder = path.startswith((".", "/", "~")) or Path(model_folder(path)).is_dir()
    return None if is_folder else f"hf download {path}"


def weight_problems(folder: Path) -> list[str]:
    """What is wrong with the safetensors files of a model folder: absent, cut short, or not safetensors at all.

    The header of a file says where its last tensor ends (https://github.com/huggingface/safetensors#format).
    """
    if (folder / _INDEX).is_file():
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{_INDEX} is not an index of safetensors files"]
    elif (folder / _SINGLE).is_file():
        names = [_SINGLE]
    elif any(folder.glob("*.bin")):
        return [f"only pickled weights (*.bin), which are not read; {_SINGLE} is missing"]
    else:
        return [f"no weights: {_SINGLE} is missing"]
    return [problem for name in names if (problem := _file_problem(folder / name))]


def _file_problem(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length < size else {}
        expected = 8 + length + max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{file.name} is no safetensors file"
    return None if size == expected else f"{file.name} has {size:,} bytes instead of {expected:,}"
