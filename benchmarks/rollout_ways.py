"""The ways of sampling completions, ours and the paper's, each in the process that also holds the trainer's weights."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from harness import device, free_memory, synchronize
from model_folders import LONGEST_TEXT, picture_side
from plain_generate import generate
from rollout_setting import GPU_MEMORY, REFERENCE_MICRO_BATCH, SLEEP_1, Setting

from mrpo.backbones import Processor, load_model, load_processor
from mrpo.config import Config
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import SamplingParams
from mrpo.rollout.hf import HFEngine
from mrpo.rollout.vllm_engine import VLLMEngine, training_options
from mrpo.weights import checkpoint_weights


class Trained:
    """The trainer's weights, and what makes its prompts."""

    def __init__(self, setting: Setting, engine: str) -> None:
        self.config = make_config(setting, engine)
        self.processor: Processor = load_processor(self.config)
        self.model: Any = load_model(self.config.model).to(device()).eval()

    def weights(self) -> Any:
        return checkpoint_weights(self.model, zero_stage=0)


class Way(Protocol):
    """One way of sampling."""

    trained: Trained

    def start(self) -> dict[str, float]:
        """Makes it ready: `start s`, and bytes of a GPU `before` and `started`."""

    def sample(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]: ...

    def sync(self) -> None:
        """Takes over the trainer's weights."""

    def close(self) -> None: ...


class HfWay:
    """Our engine on the trained model itself, all completions at once."""

    def __init__(self, setting: Setting) -> None:
        self.trained = Trained(setting, "hf")
        trained, count = self.trained, setting.max_samples
        self._engine = HFEngine(trained.model, trained.processor, batch_size=count, weights=nullcontext)

    def start(self) -> dict[str, float]:
        return {}

    def sample(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]:
        return self._engine.generate(prompts, params)

    def sync(self) -> None:
        """It is the trained model."""

    def close(self) -> None:
        self._engine.close()


class ReferenceWay:
    """As the paper's code: Hugging Face's `generate`, two completions at a time, one pair after the other."""

    def __init__(self, setting: Setting) -> None:
        self.trained = Trained(setting, "hf")

    def start(self) -> dict[str, float]:
        return {}

    def sample(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]:
        return [self._group(prompt, params, seed) for prompt, seed in zip_longest(prompts, params.seeds, fillvalue=0)]

    def _group(self, prompt: EncodedPrompt, params: SamplingParams, seed: int) -> list[Completion]:
        group: list[Completion] = []
        while (missing := params.num_completions - len(group)) > 0:
            group += generate(
                self.trained.model,
                self.trained.processor,
                prompt,
                count=min(REFERENCE_MICRO_BATCH, missing),
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                seed=seed + len(group),
            )
        return group

    def sync(self) -> None:
        """It is the trained model."""

    def close(self) -> None:
        """Nothing to end."""


class VllmWay:
    """Our engine in the process of the trainer. `cache`: a folder for what vLLM compiles, instead of its own."""

    def __init__(self, name: str, setting: Setting, cache: str = "") -> None:
        if cache:
            os.environ["VLLM_CACHE_ROOT"] = cache
        import_module("vllm.entrypoints.llm")  # not part of the start, as little as TRL's import of it
        self._setting = setting
        # As rollout.sleep_level; and an engine that cannot sleep would be compiled anew.
        self._level = {SLEEP_1: 1}.get(name, 2)
        self.trained = Trained(setting, "vllm")
        self.engine: VLLMEngine

    def start(self) -> dict[str, float]:
        trained, before = self.trained, used_bytes()
        began = time.perf_counter()
        self.engine = VLLMEngine(
            trained.config.model,
            trained.processor,
            max_tokens=self._setting.max_length,
            max_images=1,
            max_concurrent=self._setting.max_samples,
            sleep_level=self._level,
            **training_options(trained.config.rollout),
        )
        seconds, started = time.perf_counter() - began, used_bytes()
        self.sync()
        return {"start s": seconds, "before": before, "started": started}

    def sample(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]:
        return self.engine.generate(prompts, params)

    def sync(self) -> None:
        self.engine.sync(self.trained.weights)

    def nap(self) -> dict[str, float]:
        """Sleeps and wakes: bytes of a GPU `awake` and `asleep`, seconds of both, and until weights are back."""
        engine, awake = self.engine, used_bytes()
        began = time.perf_counter()
        engine.sleep()
        synchronize()
        slept, asleep = time.perf_counter() - began, used_bytes()
        began = time.perf_counter()
        engine._wake("weights")
        engine._wake("kv_cache")
        synchronize()
        woken = time.perf_counter() - began
        if self._level == 2:
            self.sync()
        synchronize()
        ready = time.perf_counter() - began
        return {"awake": awake, "asleep": asleep, "sleep s": slept, "wake s": woken, "seconds": ready}

    def close(self) -> None:
        self.engine.close()


def make_config(setting: Setting, engine: str) -> Config:
    """The configuration of a run that samples like this. On a CPU vLLM starts without compiling."""
    on_gpu = torch.cuda.is_available()
    side = picture_side(Path(setting.model), setting.max_image_tokens)
    return Config.model_validate(
        {
            "model": {"path": setting.model, "dtype": "bfloat16" if on_gpu else "float32"},
            "data": {"max_image_pixels": side * side},
            "prompt": {"max_tokens": setting.max_image_tokens + LONGEST_TEXT},
            "rollout": {
                "engine": engine,
                "group_size": setting.group,
                "max_tokens": setting.max_length,
                "batch_size": setting.max_samples,
                "gpu_memory": GPU_MEMORY,
                "enforce_eager": not on_gpu,
            },
        }
    )


def used_bytes() -> float:
    """Of a GPU's memory, by whomever; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    synchronize()
    free_memory()
    free, total = torch.cuda.mem_get_info()
    return float(total - free)
