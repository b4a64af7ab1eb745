"""What happens when a pass runs out of memory, with passes and an engine that are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mrpo.batching import Row
from mrpo.errors import UserError
from mrpo.pass_runner import PassRunner
from mrpo.passes import Pass
from mrpo.records import EncodedPrompt


def make_pass(*lengths: int) -> Pass:
    """Completions of these lengths behind a prompt of 3 tokens."""
    prompt = EncodedPrompt(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), {}, (), ())
    rows = tuple(Row(prompt, (0,) * n, torch.ones(n), torch.ones(n)) for n in lengths)
    return Pass(rows, tuple(range(len(rows))), packed=True)


@dataclass
class PlannerStandIn:
    shrunk: list[int] = field(default_factory=list)

    def shrink(self, parts: Sequence[Pass]) -> None:
        self.shrunk.append(max(part.tokens for part in parts))


@dataclass
class EngineStandIn:
    """Sums the tokens of the passes whose backward pass it has run; those of `torn` tokens it leaves half way, once."""

    torn: set[int] = field(default_factory=set)
    total: float = 0.0
    boundaries: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.module = torch.nn.Linear(1, 1)
        self.optimizer = self

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: torch.Tensor) -> None:
        tokens = int(loss)
        if tokens in self.torn:
            self.torn.remove(tokens)
            self.total += 0.5
            raise torch.OutOfMemoryError("no memory\nand a long explanation")
        self.total += tokens

    def zero_grad(self) -> None:
        self.total = 0.0


def make_runner(zero_stage: int = 0) -> tuple[PassRunner, PlannerStandIn]:
    planner = PlannerStandIn()
    return PassRunner(planner, zero_stage), planner  # type: ignore[arg-type]


def marked(*passes: Pass) -> Iterator[tuple[Pass, bool]]:
    return ((passed, passed is passes[-1]) for passed in passes)


def forward(passed: Pass) -> tuple[torch.Tensor, int]:
    return torch.tensor(float(passed.tokens)), passed.tokens


def limited(most: int) -> Any:
    def run(passed: Pass) -> int:
        if passed.tokens > most:
            raise torch.OutOfMemoryError("no memory")
        return passed.tokens

    return run


def test_a_pass_is_split_in_two_and_told() -> None:
    runner, planner = make_runner()
    results = runner.run([make_pass(10, 9, 8, 7), make_pass(5)], limited(25))
    assert [[len(row.token_ids) for row in passed.rows] for passed, _ in results] == [[10, 7], [9, 8], [5]]
    assert [tokens for _, tokens in results] == [20, 20, 8]
    assert runner.splits == 1
    assert planner.shrunk == [20]
    assert runner.messages == ["a pass of 37 tokens did not fit the memory and was split: no memory"]


def test_an_interrupted_backward_pass_counts_nothing_twice() -> None:
    engine = EngineStandIn(torn={14})
    runner, _ = make_runner()
    results = runner.accumulate(marked(make_pass(20), make_pass(6, 5), make_pass(1)), engine, forward)
    assert engine.total == 23 + (9 + 8) + 4 == sum(tokens for _, tokens in results)
    assert engine.boundaries[-1]
    assert not any(engine.boundaries[:-1])


def test_a_pass_is_asked_for_when_the_one_before_it_is_done() -> None:
    engine = EngineStandIn()
    runner, _ = make_runner()
    totals: list[float] = []

    def source() -> Iterator[tuple[Pass, bool]]:
        for passed in (make_pass(20), make_pass(6, 5)):
            totals.append(engine.total)
            yield passed, bool(totals[1:])

    runner.accumulate(source(), engine, forward)
    assert totals == [0, 23]
    assert engine.boundaries == [False, True]


@pytest.mark.parametrize(
    ("torn", "tokens", "boundaries"),
    [(26, [12, 17, 14], [False, False, False, True]), (14, [26, 9, 8], [False, True, False, False, True])],
)
def test_nothing_but_the_last_of_what_became_of_the_last_pass_ends_an_update(
    torn: int, tokens: list[int], boundaries: list[bool]
) -> None:
    engine = EngineStandIn(torn={torn})
    runner, _ = make_runner()
    results = runner.accumulate(marked(make_pass(9, 8, 6), make_pass(6, 5)), engine, forward)
    assert [count for _, count in results] == tokens
    assert engine.total == sum(tokens)
    assert engine.boundaries == boundaries


def test_what_was_done_is_kept_when_a_forward_pass_fails() -> None:
    engine = EngineStandIn()
    runner, _ = make_runner()
    calls: list[int] = []

    def failing(passed: Pass) -> tuple[torch.Tensor, int]:
        calls.append(passed.tokens)
        if passed.tokens == 14:
            raise torch.OutOfMemoryError("no memory")
        return forward(passed)

    runner.accumulate(marked(make_pass(20), make_pass(6, 5)), engine, failing)
    assert calls == [23, 14, 9, 8]
    assert engine.total == 23 + 9 + 8


@pytest.mark.parametrize(
    ("passed", "zero_stage", "words"),
    [
        (make_pass(40), 0, "set update.checkpointing=all"),  # one completion cannot be split
        (make_pass(30, 29), 0, "set update.checkpointing=all"),  # nor is its half
        (make_pass(9, 9, 9), 3, "deepspeed.zero_stage=3 does not allow to split it midway; lower update.token_budget"),
    ],
)
def test_what_cannot_be_split_names_what_to_change(passed: Pass, zero_stage: int, words: str) -> None:
    runner, _ = make_runner(zero_stage)
    with pytest.raises(UserError, match=words):
        runner.run([passed], limited(20))


def test_in_an_update_gradients_are_shared_inside_a_pass_from_stage_2_on() -> None:
    runner, _ = make_runner(2)
    with pytest.raises(UserError, match="zero_stage=2 does not allow"):
        runner.accumulate(marked(make_pass(6, 5)), EngineStandIn(torn={14}), forward)
    assert runner.run([make_pass(6, 5)], limited(10))
