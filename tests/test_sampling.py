"""The first half of a step: prompts, and the loss inputs that are known before the verdicts."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from scored_items import alone

from mrpo.batching import Row
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.in_thread import NAME
from mrpo.records import Completion, EncodedPrompt, Example
from mrpo.rollout import SamplingParams
from mrpo.sampling import Sampler, token_weights
from mrpo.stopwatch import Stopwatch


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("sequence", [1 / (2 * 2), 1 / (4 * 2), 0.0]),
        ("token", [1 / 6, 1 / 6, 0.0]),
        ("constant", [1 / (3 * 8), 1 / (3 * 8), 0.0]),
    ],
)
def test_token_weights(normalization: str, expected: list[float]) -> None:
    config = Config.model_validate({"loss": {"normalization": normalization}, "rollout": {"max_tokens": 8}})
    weights = token_weights(config, alone(), [2, 4, 8], [True, True, False])
    assert [len(w) for w in weights] == [2, 4, 8]
    for row, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(row, torch.full_like(row, value))


def test_weights_of_a_batch_without_kept_completions_are_zero() -> None:
    weights = token_weights(Config(), alone(), [3], [False])
    assert weights[0].tolist() == [0.0] * 3


class Recorder:
    """Stands for processor, policy, engine and scorer: completions of two tokens, and who made which prompt."""

    def __init__(self, broken: str = "") -> None:
        self.processor = self
        self.made: list[tuple[str, str]] = []
        self._broken = broken

    def encode_prompt(self, example: Example) -> EncodedPrompt:
        self.made.append((example.id, threading.current_thread().name))
        if example.id == self._broken:
            raise UserError(f"{example.id}: its image cannot be read")
        return EncodedPrompt(torch.tensor([1]), torch.tensor([0]), {}, (1,), (), example.id)

    def generate(self, prompts: list[EncodedPrompt], params: SamplingParams, on_done: Any) -> list[list[Completion]]:
        groups = [[Completion((1, 2), "", "stop")] * params.num_completions for _ in prompts]
        for prompt, group in enumerate(groups):
            for place, completion in enumerate(group):
                on_done(prompt, place, completion)
        return groups

    def submit(self, example: Example, completion: Completion) -> str:
        return example.id

    def with_logprobs(self, rows: list[Row], *, old: bool) -> list[Row]:
        return rows

    def sleep(self) -> None:
        pass


def make_sampler(recorder: Any) -> Sampler:
    config = Config.model_validate({"optim": {"batch_size": 4}, "rollout": {"group_size": 2}})
    examples = [Example(f"e{i}", (), "What?", "lung", None, "train") for i in range(6)]
    return Sampler(config, alone(), recorder, recorder, recorder, examples, Stopwatch())


def test_prompts_may_be_made_in_a_thread_before_their_step() -> None:
    recorder = Recorder()
    sampler = make_sampler(recorder)
    expected = [[group.example.id for group in sampler.sample(step).groups] for step in range(3)]
    assert {thread for _, thread in recorder.made} == {threading.current_thread().name}
    recorder.made.clear()
    sampler.prepare(1)
    sampled = [sampler.sample(step) for step in range(3)]
    assert [[group.example.id for group in one.groups] for one in sampled] == expected
    assert [[group.prompt.message for group in one.groups] for one in sampled] == expected
    assert sorted(name for name, _ in recorder.made) == sorted(name for names in expected for name in names)
    assert {name for name, thread in recorder.made if thread == NAME} == set(expected[1])


def test_a_prompt_that_cannot_be_made_is_told_when_its_step_begins() -> None:
    broken = make_sampler(Recorder()).sample(1).groups[0].example.id
    sampler = make_sampler(Recorder(broken))
    sampler.prepare(1)
    sampler.sample(0)
    with pytest.raises(UserError, match=f"{broken}: its image cannot be read"):
        sampler.sample(1)
