"""Rollouts with the trained model itself, as Hugging Face's forward pass computes it.

Every prompt draws from a generator of its own, so its completions do not depend on which other prompts share the
batch, on the number of processes, or on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from mrpo.backbones import Processor, batch_images, to_device
from mrpo.backbones.attention import use_prefix_attention
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import OnDone, SamplingParams, Weights
from mrpo.rollout.decoding import Choose, ExactSampler, decode, most_likely


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
        if model.config.get_text_config()._attn_implementation == "sdpa":
            use_prefix_attention(model)  # the same on rows of their own, without a copy of keys for every token
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._weights = weights
        eos = model.generation_config.eos_token_id or processor.tokenizer.eos_token_id
        self._eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)

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
        model, size = self._model, params.num_completions
        found: dict[int, Completion] = {}

        def on_end(number: int, token_ids: Sequence[int]) -> None:
            found[number] = self._completion(token_ids)
            if on_done is not None:
                on_done(*divmod(number, size), found[number])

        choose: Choose = most_likely
        if params.temperature > 0:
            choose = ExactSampler(params.temperature, seeds, size, model.device)
        decode(
            model,
            self._inputs(prompts),
            choose,
            copies=size,
            max_tokens=params.max_tokens,
            end_ids=self._eos_ids,
            # A sampled placeholder would claim an image that is not there, which the model's forward refuses.
            never_ids=self._processor.placeholder_ids,
            on_end=on_end,
        )
        completions = [found[number] for number in range(len(found))]
        return [completions[i : i + size] for i in range(0, len(completions), size)]

    def _inputs(self, prompts: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
        """Of a forward pass over `prompts`, padded on the left, on the model's device."""
        model, family, pad = self._model, self._processor.family, self._processor.tokenizer.pad_token_id
        positions = _padded([family.prompt_positions(model.model, prompt) for prompt in prompts], 0, dim=1)
        inputs = {
            "input_ids": _padded([prompt.input_ids for prompt in prompts], pad),
            "attention_mask": _padded([torch.ones_like(prompt.input_ids) for prompt in prompts], 0),
            "position_ids": positions if len(positions) > 1 else positions[0],
            **family.forward_inputs(_padded([prompt.token_type_ids for prompt in prompts], 0)),
        }
        return to_device(inputs, model.device, model.dtype) | batch_images(prompts, model.device, model.dtype)

    def _completion(self, token_ids: Sequence[int]) -> Completion:
        ended = token_ids[-1] in self._eos_ids
        return Completion(tuple(token_ids), self._processor.decode(token_ids), "stop" if ended else "length")


def _shifted(on_done: OnDone, first: int, prompt: int, index: int, completion: Completion) -> None:
    """`on_done` for a batch whose first prompt is the caller's prompt number `first`."""
    on_done(first + prompt, index, completion)


def _padded(rows: Sequence[torch.Tensor], value: int, dim: int = 0) -> torch.Tensor:
    """`rows`, whose last dimension differs, padded on the left and stacked along `dim`."""
    length = max(row.shape[-1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (length - row.shape[-1], 0), value=value) for row in rows], dim)


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
