"""Rollout engines: prompts in, completions out, token for token what the sampler drew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mrpo.records import Completion, EncodedPrompt


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `seeds` names one seed per prompt (unused when greedy)."""

    num_completions: int
    max_tokens: int
    temperature: float
    seeds: tuple[int, ...] = ()


class RolloutEngine(Protocol):
    """Generates completions with the policy's current weights."""

    def generate(self, prompts: Sequence[EncodedPrompt], params: SamplingParams) -> list[list[Completion]]:
        """`params.num_completions` completions of each prompt, in order."""
        ...
