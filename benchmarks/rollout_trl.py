"""TRL's VLLMGeneration, colocated as its GRPOTrainer starts it; the engine has our limits and the trainer's dtype."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import vllm
from accelerate import Accelerator  # type: ignore[import-untyped]
from model_folders import LONGEST_TEXT
from rollout_setting import GPU_MEMORY, Setting
from rollout_ways import Trained, used_bytes
from trl.generation import vllm_generation

from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import SamplingParams


class TrlWay:
    """One engine, one process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.trained = Trained(setting, "vllm")
        # TRL names no dtype, and vLLM takes float32 for a request of bfloat16.
        own: Any = partial(vllm.LLM, dtype=self.trained.config.model.dtype)
        vars(vllm_generation)["LLM"] = own

    def start(self) -> dict[str, float]:
        setting, before = self._setting, used_bytes()
        never = dict.fromkeys(self.trained.processor.placeholder_ids, -100.0)
        began = time.perf_counter()
        self._generation = vllm_generation.VLLMGeneration(
            self.trained.model,
            Accelerator(cpu=not torch.cuda.is_available()),
            self.trained.processor.tokenizer,
            gpu_memory_utilization=GPU_MEMORY,
            max_model_length=setting.max_image_tokens + LONGEST_TEXT + setting.max_length,
            max_num_seqs=setting.max_samples,
            max_completion_length=setting.max_length,
            # Completions are held at one length, and never claim an image.
            generation_kwargs={"ignore_eos": True, "logit_bias": never},
        )
        return {"start s": time.perf_counter() - began, "before": before, "started": used_bytes()}

    def sample(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]:
        """Every prompt once for each of its completions, as the trainer asks."""
        own, count = self._generation, params.num_completions
        own.temperature, own.max_completion_length = params.temperature, params.max_tokens
        repeated = [prompt for prompt in prompts for _ in range(count)]
        ids, pictures = [list(p.text_ids) for p in repeated], [list(p.pictures) for p in repeated]
        used, found, logprobs, _ = own.generate(ids, cast(Any, pictures), count)
        for prompt, tokens in zip(repeated, used, strict=True):
            if list(tokens) != prompt.input_ids.tolist():
                raise RuntimeError(f"sampled behind a prompt of {len(tokens)} tokens, not {len(prompt.input_ids)}")
        rows = [
            Completion(tuple(tokens), "", "length", tuple(place[0] for place in places))
            for tokens, places in zip(found, logprobs, strict=True)
        ]
        return [rows[first : first + count] for first in range(0, len(rows), count)]

    def sync(self) -> None:
        self._generation.sync_weights()

    def close(self) -> None:
        """The engine ends with its process."""
