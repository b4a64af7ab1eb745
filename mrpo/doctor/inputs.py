"""What a configuration names besides model and judge: the data, the prompts made of it, the folder to write to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mrpo.backbones import Processor
from mrpo.config import Config
from mrpo.data import load_dataset
from mrpo.data.targets import explained
from mrpo.doctor.check import Check, attempt
from mrpo.doctor.memory import PromptSize, prompts_per_step
from mrpo.records import Example
from mrpo.run_folder import holds_run

PROMPTS_READ = 16  # questions whose prompts are made to see how long they are


@dataclass(frozen=True)
class Data:
    """Questions to train on and held-out ones, where the run is evaluated on them."""

    train_set: Sequence[Example]
    eval_set: Sequence[Example]


def read_data(config: Config) -> Data:
    """Reads the questions that a run would read.

    Raises:
        UserError: the folder or its files are missing or broken.
    """
    evaluated = config.eval.at_start or config.eval.at_end
    return Data(load_dataset(config.data, "train"), load_dataset(config.data, "test") if evaluated else ())


def check_data(config: Config, data: Data) -> Check:
    """How many questions there are, and for sft whether they have rationales."""
    place = config.data.file or config.data.root
    fact = config.data.name + (f" in {place}" if place else "")
    fact += f": {len(data.train_set):,} training and {len(data.eval_set):,} held-out questions"
    if config.algorithm == "sft":
        count = len(explained(data.train_set))
        if not count:
            return Check("data", "missing", f"{fact}, without the gold rationales that sft imitates", "algorithm=mrpo")
        if left_out := len(data.train_set) - count:
            return Check("data", "warning", f"{fact}; sft leaves out {left_out:,} without a gold rationale")
    return Check("data", "ok", fact)


def read_prompts(processor: Processor, examples: Sequence[Example]) -> PromptSize:
    """The most tokens and image patches that the prompts of some of `examples` take.

    Raises:
        UserError: a prompt is longer than `prompt.max_tokens`, or an image cannot be read.
    """
    every = max(1, len(examples) // PROMPTS_READ)
    prompts = [processor.encode_prompt(examples[i]) for i in range(0, len(examples), every)[:PROMPTS_READ]]
    return PromptSize(
        tokens=max(len(prompt.input_ids) for prompt in prompts),
        patches=max(_patches(prompt.images) for prompt in prompts),
        source=f"the most of {len(prompts)} questions",
    )


def check_prompts(config: Config, prompt: PromptSize) -> Check:
    fact = f"{prompt.tokens} tokens, {prompt.source}; prompt.max_tokens={config.prompt.max_tokens}"
    return Check("prompts", "ok", fact)


def _patches(images: Mapping[str, torch.Tensor]) -> int:
    """Image patches of one prompt: rows of Qwen's flat (patches, values), or tiles of 14 x 14 pixels of InternVL's."""
    pixels = images.get("pixel_values")
    if pixels is None:
        return 0
    return pixels.shape[0] if pixels.dim() == 2 else pixels.shape[0] * (pixels.shape[-1] // 14) ** 2


def check_batch(config: Config, num_processes: int) -> Check:
    """Whether the processes can share a step's prompts evenly."""
    prompts = prompts_per_step(config)
    fact = f"{prompts} prompts a step for {num_processes} process{'es' if num_processes > 1 else ''}"
    if prompts % num_processes:
        per_prompt = config.optim.batch_size // prompts
        least = -(-prompts // num_processes) * num_processes * per_prompt
        return Check("batch", "missing", f"{fact}, which cannot share them evenly", f"optim.batch_size={least}")
    return Check("batch", "ok", fact)


def check_output(config: Config) -> Check:
    folder = config.output_dir
    if folder.exists() and not folder.is_dir():
        return Check("output_dir", "missing", f"{folder} is a file", "output_dir=FOLDER")
    found, problem = attempt("output_dir", partial(holds_run, folder), "output_dir=FOLDER")
    if problem is not None:
        return problem
    if found:
        remedy = "mrpo train --resume or --overwrite, or output_dir=FOLDER"
        return Check("output_dir", "warning", f"{folder} already holds a run", remedy)
    return Check("output_dir", "ok", str(folder))
