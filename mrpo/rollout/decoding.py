"""Token by token with a key-value cache: every prompt is computed once, its completions go on from there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import torch

from mrpo.rollout.growing_cache import growing_cache

# (logits [B, V], the numbers of their completions, ascending) -> tokens [B]
Choose: TypeAlias = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]

# Share of a batch that has to be finished before it is taken out, which copies the cache of the others.
_WORTH_DROPPING = 0.125


def decode(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    choose: Choose,
    *,
    copies: int,
    max_tokens: int,
    end_ids: Collection[int],
    never_ids: Sequence[int],
    on_end: Callable[[int, Sequence[int]], None],
) -> None:
    """Generates `copies` completions of each of P prompts with a Hugging Face model.

    Args:
        inputs: of a forward pass over the prompts, padded on the left to L tokens: among them `attention_mask` (P, L)
            and `position_ids` (P, L), or (A, P, L) where the rotary embedding has A axes.
        end_ids: tokens that end a completion.
        never_ids: tokens that are not to be chosen.
        on_end: is told of each completion when it ends, as its number, prompt by prompt, and its tokens.
    """
    cache = growing_cache(inputs["attention_mask"].shape[1] + max_tokens)
    output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1].repeat_interleave(copies, dim=0)
    cache.batch_repeat_interleave(copies)
    mask = inputs["attention_mask"].repeat_interleave(copies, dim=0)
    axes = inputs["position_ids"].shape[:-2]
    # A completion goes on behind its prompt's largest position, on all axes alike.
    last = inputs["position_ids"].amax(dim=(*range(len(axes)), -1)).repeat_interleave(copies)
    numbers = [*range(len(logits))]
    tokens: list[list[int]] = [[] for _ in numbers]
    running = set(numbers)
    for length in range(1, max_tokens + 1):
        logits[:, list(never_ids)] = -torch.inf
        chosen = choose(logits, numbers)
        for number, token in zip(numbers, chosen.tolist(), strict=True):
            if number in running:
                tokens[number].append(token)
                if token in end_ids or length == max_tokens:
                    running.remove(number)
                    on_end(number, tokens[number])
        if not running:
            return
        if len(running) <= (1 - _WORTH_DROPPING) * len(numbers):
            kept = torch.tensor([i for i, number in enumerate(numbers) if number in running], device=logits.device)
            cache.batch_select_indices(kept)
            chosen, mask, last = (values[kept] for values in (chosen, mask, last))
            numbers = sorted(running)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = (last + length)[:, None].expand(*axes, -1, -1)
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]


class ExactSampler:
    """Draws from softmax(logits / temperature), every prompt from a generator of its own.

    The largest of logits / T - log E with E ~ Exp(1) is such a draw.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], copies: int, device: torch.device) -> None:
        self._temperature = temperature
        self._copies = copies
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        noise = []
        for prompt, group in groupby(numbers, key=lambda number: number // self._copies):
            drawn = logits.new_empty(self._copies, logits.shape[1], dtype=torch.float32)
            drawn.exponential_(generator=self._generators[prompt])
            places = [number % self._copies for number in group]
            # As much is drawn for a completion whether or not the others of its prompt are finished.
            noise.append(drawn if len(places) == self._copies else drawn[places])
        return (logits.float() / self._temperature - torch.cat(noise).log()).argmax(dim=-1)


def most_likely(logits: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """Greedy decoding."""
    return logits.argmax(dim=-1)
