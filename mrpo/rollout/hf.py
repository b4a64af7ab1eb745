"""Rollouts with Hugging Face `generate` and its KV cache, on the trained model itself.

Every prompt draws from a generator of its own, so its completions do not depend on which other prompts share the
batch, on the number of processes, or on where a run was resumed. Sampling is exact: the largest of
logits / T - log E with E ~ Exp(1) is a draw from softmax(logits / T).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mrpo.backbones import Processor, batch_images, to_device
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import OnDone, SamplingParams, Weights


class HFEngine:
    """Batched generation.

    `weights` opens a context in which all parameters are whole (ZeRO-3 shards are gathered there).
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        *,
        batch_size: int,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._weights = weights
        eos = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
        self._eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
        # A sampled placeholder would claim an image that is not there, which the model's forward refuses.
        self._never = list(processor.placeholder_ids)

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        per_batch = max(1, self._batch_size // params.num_completions)
        groups: list[list[Completion]] = []
        with self._weights(), _inference(self._model):
            for start in range(0, len(prompts), per_batch):
                batch, seeds = prompts[start : start + per_batch], params.seeds[start : start + per_batch]
                groups += self._generate_batch(batch, params, seeds, on_done and partial(_shifted, on_done, start))
        return groups

    def sync(self, weights: Weights) -> None:
        """Nothing to do: this engine generates with the trained model."""

    def sleep(self) -> None:
        """Nothing to give back: the key-value cache lives as long as a batch."""

    def close(self) -> None:
        """Nothing to end: the model belongs to the caller."""

    def _generate_batch(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, seeds: Sequence[int], on_done: OnDone | None
    ) -> list[list[Completion]]:
        model, tokenizer = self._model, self._processor.tokenizer
        pad = tokenizer.pad_token_id
        length = max(len(p.input_ids) for p in prompts)
        input_ids = torch.stack([_pad_left(p.input_ids, length, pad) for p in prompts])
        mask = torch.stack([_pad_left(torch.ones_like(p.input_ids), length, 0) for p in prompts])
        types = torch.stack([_pad_left(p.token_type_ids, length, 0) for p in prompts])
        inputs = {"input_ids": input_ids, "attention_mask": mask, **batch_images(prompts)}
        inputs |= self._processor.family.forward_inputs(types)
        sampled = params.temperature > 0
        draw = [_ExactSampler(params.temperature, seeds, params.num_completions, model.device)] if sampled else []
        watch = [_Watch(length, params, self._eos_ids, self._completion, on_done)] if on_done else []
        sequences = model.generate(
            **to_device(inputs, model.device, model.dtype),
            logits_processor=LogitsProcessorList(draw),
            stopping_criteria=StoppingCriteriaList(watch),
            generation_config=GenerationConfig(
                max_new_tokens=params.max_tokens,
                do_sample=sampled,
                num_return_sequences=params.num_completions,
                eos_token_id=list(self._eos_ids),
                pad_token_id=pad,
                # A checkpoint's own generation settings would silently sample from another distribution.
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                suppress_tokens=self._never,
            ),
        )
        completions = [self._completion(row) for row in sequences[:, length:].tolist()]
        size = params.num_completions
        return [completions[i : i + size] for i in range(0, len(completions), size)]

    def _completion(self, row: list[int]) -> Completion:
        """Cuts the padding after the first end token."""
        end = next((i for i, token in enumerate(row) if token in self._eos_ids), None)
        token_ids = tuple(row if end is None else row[: end + 1])
        return Completion(token_ids, self._processor.decode(token_ids), "length" if end is None else "stop")


class _Watch(StoppingCriteria):
    """Stops nothing; tells of each completion as soon as its last token is there."""

    def __init__(
        self,
        prompt_length: int,
        params: SamplingParams,
        eos_ids: Sequence[int],
        completion: Callable[[list[int]], Completion],
        on_done: OnDone,
    ) -> None:
        self._start = prompt_length
        self._params = params
        self._eos_ids = frozenset(eos_ids)
        self._completion = completion
        self._on_done = on_done
        self._told: set[int] = set()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        at_limit = input_ids.shape[1] - self._start == self._params.max_tokens
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if row not in self._told and (at_limit or token in self._eos_ids):
                self._told.add(row)
                completion = self._completion(input_ids[row, self._start :].tolist())
                self._on_done(*divmod(row, self._params.num_completions), completion)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def _shifted(on_done: OnDone, first: int, prompt: int, index: int, completion: Completion) -> None:
    """`on_done` for a batch whose first prompt is the caller's prompt number `first`."""
    on_done(first + prompt, index, completion)


class _ExactSampler(LogitsProcessor):
    """Draws one token per row and leaves only that token possible."""

    def __init__(self, temperature: float, seeds: Sequence[int], group_size: int, device: torch.device) -> None:
        self._temperature = temperature
        self._group_size = group_size
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for rows, generator in zip(noise.split(self._group_size), self._generators, strict=True):
            rows.exponential_(generator=generator)
        chosen = (scores.float() / self._temperature - noise.log()).argmax(dim=-1, keepdim=True)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, chosen, 0.0)  # type: ignore[return-value]


def _pad_left(row: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return torch.cat([row.new_full((length - len(row),), value), row])


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients, undone at the end: left on, it would switch gradient checkpointing off."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
