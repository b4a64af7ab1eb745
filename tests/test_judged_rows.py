"""Rows with advantages as verdicts arrive, of one process and of two, which are threads here."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from scored_items import scored
from thread_processes import Meeting, ThreadRuntime

from mrpo import algorithms
from mrpo.batching import Row
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.judged_rows import JudgedRows
from mrpo.records import EncodedPrompt, Example, Unjudged, Verdict
from mrpo.sampling import Sampled
from mrpo.scoring import ParsedCompletion, PendingScore, Scorer, columns, score_table
from mrpo.shaping import token_advantages
from mrpo.stopwatch import Stopwatch

SIZE = 2  # completions of a prompt
CPU = torch.device("cpu")
EXAMPLE = Example("e", (), "What?", "a small mass", None, "train")
# Four prompts, in each of which the rewards differ.
ITEMS = [
    replace(scored(validity, tokens=tokens), answer=answer)
    for validity, answer, tokens in [
        ([True, False], "a small mass", 7),
        ([False, False, True], "none", 11),
        ([False, True], "a mass", 9),
        (None, "a small mass", 9),
        ([True], "none", 5),
        ([False], "a small mass", 6),
        ([True, True], "small", 8),
        ([True, False], None, 8),
    ]
]
GROUPS = range(len(ITEMS) // SIZE)


class Step:
    """The completions of one process, whose verdicts come when `judge` is told to."""

    def __init__(self, groups: range = GROUPS, runtime: Any = None, **sections: Any) -> None:
        self.config = Config.model_validate({"rollout": {"group_size": SIZE}} | sections)
        self.items = ITEMS[groups.start * SIZE : groups.stop * SIZE]
        self.verdicts: list[Future[Verdict | Unjudged]] = [Future() for _ in self.items]
        pending = [
            PendingScore(ParsedCompletion(EXAMPLE, item.completion, item.steps, item.answer), verdict)
            for item, verdict in zip(self.items, self.verdicts, strict=True)
        ]
        scorer = Scorer(self.config, cast(Any, None), None, "think")
        rows = [make_row(len(item.completion.token_ids)) for item in self.items]
        self.watch = Stopwatch()
        runtime = runtime or ThreadRuntime(0, Meeting(1), CPU)
        self.judged = JudgedRows(self.config, runtime, scorer, self.watch, Sampled([], pending, rows))
        self.parts = self.judged.parts()

    def judge(self, *places: int) -> None:
        for place in places:
            self.verdicts[place].set_result(self.items[place].verdict)

    def next(self) -> tuple[list[int], bool]:
        """The places of the next part's rows, and whether it is the last."""
        rows, is_last = next(self.parts)
        return [next(i for i, own in enumerate(self.judged.rows) if own is row) for row in rows], is_last


def make_row(length: int) -> Row:
    prompt = EncodedPrompt(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), {}, (), ())
    return Row(prompt, (0,) * length, torch.zeros(length), torch.ones(length))


def expected_advantages(step: Step) -> list[list[float]]:
    """From the scores of all completions at once."""
    table = columns(score_table(step.judged.scored, step.config.advantage.tau))
    parts = (table[name].view(-1, SIZE) for name in ("answer", "process", "length"))
    values = algorithms.advantages(step.config, *parts).flatten()
    return [row.tolist() for row in token_advantages(step.config, step.judged.scored, values)]


def advantages(step: Step) -> list[list[float]]:
    return [row.advantages.tolist() for row in step.judged.rows]


@pytest.mark.parametrize("algorithm", ["mrpo", "grpo", "gdpo"])
def test_what_is_judged_when_asked_for_is_one_part(algorithm: str) -> None:
    step = Step(algorithm=algorithm)
    step.judge(*range(8))
    assert step.next() == ([*range(8)], True)
    assert next(step.parts, None) is None
    assert [item.verdict for item in step.judged.scored] == [item.verdict for item in ITEMS]
    assert advantages(step) == expected_advantages(step)
    assert any(any(row) for row in advantages(step))


@pytest.mark.parametrize("sections", [{"algorithm": "grpo"}, {}, {"advantage": {"credit": "telescoped"}}])
def test_prompts_come_in_the_order_of_their_last_verdicts(sections: dict[str, Any]) -> None:
    step = Step(**sections)
    step.judge(4, 5, 0, 7)
    assert step.next() == ([4, 5], False)
    step.judge(1, 6)
    assert step.next() == ([0, 1, 6, 7], False)
    assert not any(advantages(step)[2])
    threading.Timer(0.05, step.judge, (3, 2)).start()
    assert step.next() == ([2, 3], True)
    assert next(step.parts, None) is None
    assert [item.completion for item in step.judged.scored] == [item.completion for item in ITEMS]
    assert advantages(step) == expected_advantages(step)
    assert step.judged.table["unjudged"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("sections", [{"algorithm": "gdpo"}, {"update": {"streamed": False}}])
def test_all_verdicts_are_waited_for_where_order_or_the_whole_batch_counts(sections: dict[str, Any]) -> None:
    step = Step(**sections)
    step.judge(*range(7))
    threading.Timer(0.05, step.judge, (7,)).start()
    assert step.next() == ([*range(8)], True)
    assert advantages(step) == expected_advantages(step)


def test_answers_are_scored_before_the_wait_which_holds_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    step = Step()
    scorer = step.judged.scorer
    reward = scorer._answer_reward

    def verdicts_come() -> None:
        nonlocal now
        now += 7
        step.judge(*range(2, 8))

    def slow_reward(predictions: list[str], golds: list[str]) -> list[tuple[float, dict[str, float]]]:
        nonlocal now
        now += 3
        return reward(predictions, golds)

    monkeypatch.setattr(scorer, "_answer_reward", slow_reward)

    step.judge(0, 1)
    next(step.parts)
    now += 100  # the update
    threading.Timer(0.05, verdicts_come).start()
    next(step.parts)
    assert step.watch.take() == {"rewards": 3, "judge_wait": 7}
    assert scorer._waited == 7


def test_the_rows_are_one_list_that_is_filled_in_place() -> None:
    """A second update on the same completions takes them when the first is done."""
    step = Step()
    rows = step.judged.rows
    step.judge(*range(8))
    next(step.parts)
    assert step.judged.rows is rows
    assert any(row.advantages.any() for row in rows)


def test_a_process_that_is_done_keeps_step_with_one_that_is_not() -> None:
    meeting = Meeting(2)
    steps = [Step(range(2), ThreadRuntime(0, meeting, CPU)), Step(range(2, 4), ThreadRuntime(1, meeting, CPU))]
    steps[0].judge(*range(4))
    steps[1].judge(2, 3)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(Step.next, steps)) == [([0, 1, 2, 3], False), ([2, 3], False)]
        steps[1].judge(0, 1)
        assert list(threads.map(Step.next, steps)) == [([], True), ([0, 1], True)]
    for step in steps:
        assert step.judged.table["tokens"].tolist() == [7, 11, 9, 9, 5, 6, 8, 8]
        assert advantages(step) == expected_advantages(step)


def test_gdpo_compares_the_completions_of_all_processes() -> None:
    meeting = Meeting(2)
    halves = [range(2), range(2, 4)]
    steps = [Step(half, ThreadRuntime(i, meeting, CPU), algorithm="gdpo") for i, half in enumerate(halves)]
    whole = Step(algorithm="gdpo")
    whole.judge(*range(8))
    whole.next()
    for step in steps:
        step.judge(*range(4))
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(Step.next, steps)) == [([0, 1, 2, 3], True)] * 2
    assert advantages(steps[0]) + advantages(steps[1]) == advantages(whole)


@pytest.mark.parametrize("limit", [0.25, 0.2])
def test_too_many_unjudged_stop_the_run_with_the_judges_reason(limit: float) -> None:
    """Of two processes the first has judged all of its own."""
    meeting = Meeting(2)
    steps = [
        Step(range(group, group + 1), ThreadRuntime(rank, meeting, CPU), judge={"max_unjudged": limit})
        for rank, group in enumerate((3, 1))
    ]
    for step in steps:
        step.judge(0, 1)
    with ThreadPoolExecutor(2) as threads:
        told = [threads.submit(step.next) for step in steps]
        for future in told:
            if limit == 0.25:
                assert future.result() == ([0, 1], True)
            else:
                with pytest.raises(UserError, match=r"25% .* judge\.max_unjudged=20%: no; when the judge answers"):
                    future.result()
