"""What both vLLM engines ask for, and how they check what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from transformers import GenerationConfig

from mrpo.backbones import Processor, model_folder
from mrpo.config import ModelConfig
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import SamplingParams

# Log-probabilities of the distribution that is sampled from: behind the temperature and the bias below.
LOGPROBS_MODE = "processed_logprobs"
_NEVER = -100.0  # the least bias that vLLM takes: e^-100 of a token's odds


def end_ids(model: ModelConfig, processor: Processor) -> tuple[int, ...]:
    """The end tokens that Hugging Face's `generate` would stop at."""
    try:
        config = GenerationConfig.from_pretrained(model_folder(model.path))
    except OSError:
        config = GenerationConfig.from_model_config(processor.model_config)
    eos = config.eos_token_id or processor.tokenizer.eos_token_id
    return tuple(eos) if isinstance(eos, list) else (eos,)


def sampling_fields(
    params: SamplingParams, seed: int | None, ends: Iterable[int], never: Iterable[int]
) -> dict[str, Any]:
    """Sampling parameters under vLLM's names, those included whose defaults a checkpoint or server could change.

    Args:
        ends: tokens that end a completion.
        never: tokens that must not be drawn: a placeholder would claim an image that is not there.
    """
    return {
        "n": params.num_completions,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": seed,  # vLLM adds the completion's number
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(ends),
        "ignore_eos": True,  # the tokenizer's end token counts only where it is one of the above
        "logit_bias": dict.fromkeys(never, _NEVER),
    }


def prompt_seeds(params: SamplingParams, count: int) -> Sequence[int | None]:
    """The seed of each of `count` prompts."""
    return params.seeds or (None,) * count


def check_expansion(prompt: EncodedPrompt, used: Sequence[int]) -> None:
    """Compares the prompt as vLLM used it with ours.

    Raises:
        RuntimeError: they differ.
    """
    if list(used) != prompt.input_ids.tolist():
        raise RuntimeError(
            f"vLLM made {len(used)} tokens of a prompt that takes {len(prompt.input_ids)} here: its image processor "
            "or chat template and the ones of transformers disagree on this checkpoint"
        )


def make_completion(
    token_ids: Sequence[int], finish_reason: str | None, logprobs: Sequence[float] | None, processor: Processor
) -> Completion:
    """The record of one completion.

    Raises:
        RuntimeError: it ended neither by an end token nor at the length limit.
    """
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a completion with {finish_reason!r}")
    ids = tuple(token_ids)
    reason: Literal["stop", "length"] = "stop" if finish_reason == "stop" else "length"
    return Completion(ids, processor.decode(ids), reason, None if logprobs is None else tuple(logprobs))
