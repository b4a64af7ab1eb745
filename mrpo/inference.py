"""Completions for a file of questions: batched, resumable, in the order of the data.

A question's completions follow from its id and the seed, and every batch begins at a multiple of its size, so a run
that was killed and goes on writes what an uninterrupted one would have written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from mrpo.backbones import Processor, load_model
from mrpo.backbones.fingerprint import fingerprint
from mrpo.completions import CompletionFile, InferredCompletion, InferredQuestion, read_completions
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.records import Completion, EncodedPrompt, Example
from mrpo.rollout import RolloutEngine, SamplingParams
from mrpo.seeding import derive_seed
from mrpo.steps import extract_answer, find_steps

__all__ = [
    "CompletionFile",
    "InferredCompletion",
    "InferredQuestion",
    "Sampling",
    "check_prompts",
    "infer",
    "make_engine",
    "make_header",
    "read_completions",
]

Engine = Literal["hf", "vllm"]


@dataclass(frozen=True)
class Sampling:
    """What completions depend on besides model and question. `temperature` 0 is greedy, with one completion each.

    Raises:
        UserError: more than one greedy completion is asked for, or a temperature that the engine does not take.
    """

    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0
    engine: Engine = "hf"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"{self.samples} samples at temperature 0 would all be the same; set a temperature above 0, as 1.0"
            )
        if self.engine == "vllm" and self.temperature > 2:
            raise UserError(f"vLLM samples at temperatures up to 2, not {self.temperature}; use the engine hf")


def make_header(model: str, processor: Processor, sampling: Sampling) -> dict[str, Any]:
    """What every row says of how it was made, and a resumed run must share."""
    return {
        "model": model,
        "fingerprint": fingerprint(model, processor.model_config),
        "think_tag": processor.think_tag,
        "sampling": asdict(sampling) | {"max_image_pixels": processor.max_image_pixels},
    }


def check_prompts(examples: Sequence[Example], processor: Processor) -> None:
    """Finds what would stop a run half way, from the texts and the sizes of the images.

    Raises:
        UserError: an id stands twice, an image cannot be opened or is too long and thin, or a prompt is too long; names
            the example.
    """
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"example {example.id}: its id stands twice in the data; ids must be unique")
        seen.add(example.id)
        processor.count_prompt_tokens(example)


def make_engine(
    config: Config, processor: Processor, sampling: Sampling, *, batch_size: int, max_images: int
) -> RolloutEngine:
    """The engine that `sampling.engine` names, with the weights of `config.model` on the GPU if there is one.

    Raises:
        UserError: vLLM is not installed, or refuses the model.
    """
    if sampling.engine == "vllm":
        from mrpo.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(
            config.model,
            processor,
            max_tokens=sampling.max_tokens,
            max_images=max_images,
            max_concurrent=batch_size,
        )
    from mrpo.rollout.hf import HFEngine

    model = load_model(config.model).to("cuda" if torch.cuda.is_available() else "cpu")
    return HFEngine(model, processor, batch_size=batch_size, weights=nullcontext)


def infer(
    examples: Sequence[Example],
    out: CompletionFile,
    *,
    processor: Processor,
    engine: RolloutEngine,
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes to `out` the rows of `examples` that it lacks.

    Args:
        batch_size: completions generated at once. In float32 they do not depend on it; in bfloat16 rounding does.
        progress: told how many questions were finished since the last call.

    Raises:
        UserError: an image turns out to be broken; the rows of the batches before are written.
    """
    per_batch = max(1, batch_size // sampling.samples)
    starts = range(out.done // per_batch * per_batch, len(examples), per_batch)
    skip = out.done - starts.start  # rows of the first batch that are there already
    for batch, prompts in _encoded([examples[start : start + per_batch] for start in starts], processor):
        params = SamplingParams(
            num_completions=sampling.samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seeds=tuple(derive_seed("infer", sampling.seed, example.id) for example in batch),
        )
        groups = engine.generate(prompts, params)
        for example, completions in zip(batch[skip:], groups[skip:], strict=True):
            out.write(example, [_inferred(completion, processor) for completion in completions])
        progress(len(batch) - skip)
        skip = 0


def _encoded(
    batches: Sequence[Sequence[Example]], processor: Processor
) -> Iterator[tuple[Sequence[Example], list[EncodedPrompt]]]:
    """Each batch with its prompts; the next one is encoded while the caller works on this one."""

    def encode(batch: Sequence[Example]) -> list[EncodedPrompt]:
        return [processor.encode_prompt(example) for example in batch]

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = deque(pool.submit(encode, batch) for batch in batches[:1])
        for i, batch in enumerate(batches):
            prompts = waiting.popleft().result()
            waiting += [pool.submit(encode, following) for following in batches[i + 1 : i + 2]]
            yield batch, prompts


def _inferred(completion: Completion, processor: Processor) -> InferredCompletion:
    steps = find_steps(completion.token_ids, processor.tokenizer, think_tag=processor.think_tag)
    return InferredCompletion(completion, tuple(steps), extract_answer(completion.text, think_tag=processor.think_tag))
