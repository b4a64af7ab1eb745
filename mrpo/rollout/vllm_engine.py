"""Rollouts with a vLLM engine in this process.

Token ids go in and come out. vLLM processes the images and expands their placeholders itself, and its sampler draws
each completion from a stream of its own, so completions do not depend on what else is under way, up to rounding.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from mrpo.backbones import Processor, model_folder
from mrpo.config import ModelConfig
from mrpo.errors import UserError
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import SamplingParams

# A later weight update needs the workers in this process; usage reports would leave the machine.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_NEVER = -100.0  # the least bias that vLLM takes: e^-100 of a token's odds


class VLLMEngine:
    """Continuous batching over as many completions as vLLM's scheduler holds.

    Args:
        max_tokens: the longest completion that will be asked for.
        max_images: the most images in a prompt.
        max_concurrent: completions under way at once.
        options: further arguments of `vllm.LLM`, which win.

    Raises:
        UserError: vLLM is not installed, or refuses the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        processor: Processor,
        *,
        max_tokens: int,
        max_images: int,
        max_concurrent: int,
        **options: Any,
    ) -> None:
        require_vllm()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import vllm

        self._vllm = vllm
        self._processor = processor
        self._eos_ids = _end_ids(model, processor)
        side = math.isqrt(processor.max_image_pixels)
        arguments = {
            "model": model_folder(model.path),
            "dtype": model.dtype,
            "trust_remote_code": model.trust_remote_code,
            "max_model_len": processor.max_prompt_tokens + max_tokens,
            "max_num_seqs": max_concurrent,
            # The size is that of the pictures which vLLM measures its memory with.
            "limit_mm_per_prompt": {"image": {"count": max_images, "width": side, "height": side}, "video": 0},
            "mm_processor_kwargs": processor.family.processor_options(processor.image_processor),
            # The checkpoint's own sampling settings would silently change the distribution.
            "generation_config": "vllm",
            "seed": 0,
        }
        try:
            self.llm = vllm.LLM(**(arguments | options))
        except (ValueError, OSError) as error:
            raise UserError(f"vLLM cannot load model.path={model.path}: {error}") from error

    def generate(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]:
        """`params.num_completions` completions of each prompt, in order.

        Raises:
            RuntimeError: vLLM expands the image tokens of a prompt otherwise than we do.
        """
        seeds = params.seeds or (None,) * len(prompts)
        sampling = [self._sampling(params, seed) for seed in seeds]
        outputs = self.llm.generate([_request(prompt) for prompt in prompts], sampling, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            _check_expansion(prompt, output.prompt_token_ids)
        return [[self._completion(completion) for completion in output.outputs] for output in outputs]

    def _sampling(self, params: SamplingParams, seed: int | None) -> Any:
        return self._vllm.SamplingParams(
            n=params.num_completions,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            seed=seed,  # vLLM adds the completion's number
            stop_token_ids=list(self._eos_ids),
            ignore_eos=True,  # the tokenizer's end token counts only where it is one of the above
            logit_bias=dict.fromkeys(self._processor.placeholder_ids, _NEVER),
            detokenize=False,
        )

    def _completion(self, output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a completion with {output.finish_reason!r}")
        token_ids = tuple(output.token_ids)
        return Completion(token_ids, self._processor.decode(token_ids), output.finish_reason)


def require_vllm() -> None:
    """Checks that vLLM is installed, without the seconds that importing it takes.

    Raises:
        UserError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("the engine vllm needs a package: pip install mrpo[vllm], or use the engine hf")


def _end_ids(model: ModelConfig, processor: Processor) -> tuple[int, ...]:
    """The end tokens that Hugging Face's `generate` would stop at."""
    try:
        config = GenerationConfig.from_pretrained(model_folder(model.path))
    except OSError:
        config = GenerationConfig.from_model_config(processor.model_config)
    eos = config.eos_token_id or processor.tokenizer.eos_token_id
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _request(prompt: EncodedPrompt) -> dict[str, Any]:
    """vLLM's TokensPrompt: one placeholder an image, and the images beside it."""
    request: dict[str, Any] = {"prompt_token_ids": list(prompt.text_ids)}
    if prompt.pictures:
        request["multi_modal_data"] = {"image": list(prompt.pictures)}
    return request


def _check_expansion(prompt: EncodedPrompt, used: Sequence[int]) -> None:
    if list(used) != prompt.input_ids.tolist():
        raise RuntimeError(
            f"vLLM made {len(used)} tokens of a prompt that takes {len(prompt.input_ids)} here: its image processor "
            "and the one of transformers disagree on this checkpoint"
        )
