"""Kept verdicts: found again by everything they depend on, by several processes at once."""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrpo.errors import UserError
from mrpo.judge import EmbeddedJudge, finished
from mrpo.judge.answers import AnswerRequest
from mrpo.judge.cache import FILE_NAME, CachedAnswerJudge, CachedJudge, VerdictCache
from mrpo.judge.lexical import LexicalJudge
from mrpo.records import Example, JudgeRequest, StepVerdict, Unjudged, Verdict


class CountingJudge(EmbeddedJudge):
    """Judges by the length of a step, fails on what it is told to, and counts what it is asked."""

    name = "counting"

    def __init__(self, identity: str = "a", fails: bool = False) -> None:
        self.identity, self.fails = identity, fails
        self.asked: Counter[str] = Counter()

    def judge_one(self, request: JudgeRequest) -> Verdict | Unjudged:
        self.asked[request.example.question] += 1
        if self.fails:
            return Unjudged("down")
        return Verdict(tuple(StepVerdict(len(step) > 2, len(step) > 4, f"{step} «é»") for step in request.steps))

    def judge_answers(self, requests: Sequence[AnswerRequest]) -> list[bool | Unjudged]:
        self.asked.update(request.example.question for request in requests)
        return [Unjudged("down") if self.fails else request.answer == request.example.answer for request in requests]

    def submit_answers(self, requests: Sequence[AnswerRequest]) -> list[Future[bool | Unjudged]]:
        return [finished(result) for result in self.judge_answers(requests)]


def request(question: str = "q", **changes: Any) -> JudgeRequest:
    example = Example("1", (Image.new("RGB", (4, 4)),), question, "gold", "why", "test")
    fields = {"steps": ("one", "three"), "answer": "gold"} | {k: v for k, v in changes.items() if k in REQUEST_FIELDS}
    return JudgeRequest(replace(example, **{k: v for k, v in changes.items() if k not in REQUEST_FIELDS}), **fields)


REQUEST_FIELDS = ("steps", "answer")


def test_a_second_run_asks_for_nothing_and_gets_the_same(tmp_path: Path) -> None:
    requests = [request(f"q{i}", steps=("a", "bcd", "efghi")[: i + 1]) for i in range(3)]
    first = CountingJudge()
    told = CachedJudge(first, VerdictCache(tmp_path)).judge(requests)
    assert told == CountingJudge().judge(requests)
    second = CountingJudge()
    assert CachedJudge(second, VerdictCache(tmp_path)).judge(requests[::-1]) == told[::-1]
    assert not second.asked


CHANGES: dict[str, dict[str, Any]] = {
    "question": {"question": "other"},
    "gold answer": {"answer_": "other"},
    "gold rationale": {"rationale": "other"},
    "no gold rationale": {"rationale": None},
    "image": {"images": (Image.new("RGB", (4, 4), "red"),)},
    "image size": {"images": (Image.new("RGB", (2, 8)),)},
    "another image": {"images": (Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4)))},
    "a step": {"steps": ("one", "four")},
    "steps joined": {"steps": ("one three",)},
    "the answer": {"answer": "silver"},
    "no answer": {"answer": None},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_verdict_depends_on_is_asked_anew(tmp_path: Path, change: str) -> None:
    changes = dict(CHANGES[change])
    gold = changes.pop("answer_", "gold")
    changed = request(**changes)
    changed = replace(changed, example=replace(changed.example, answer=gold))
    judge = CountingJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    cached.judge([request()])
    cached.judge([changed])
    assert judge.asked.total() == 2
    other = CountingJudge(identity="b")
    CachedJudge(other, VerdictCache(tmp_path)).judge([request()])
    assert other.asked.total() == 1


def test_what_it_does_not_depend_on_is_not_asked_anew(tmp_path: Path) -> None:
    judge = CountingJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    cached.judge([request()])
    cached.judge([request(id="2", split="train", metadata={"organ": "lung"})])
    assert judge.asked.total() == 1


def test_an_image_file_counts_by_its_content(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for name, color in zip(names, ("red", "red", "blue"), strict=True):
        Image.new("RGB", (4, 4), color).save(name)
    judge = CountingJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    for name in names:
        cached.judge([request(images=(name,))])
    assert judge.asked.total() == 2
    names[0].write_bytes(names[2].read_bytes() + b"more")
    cached.judge([request(images=(names[0],))])
    assert judge.asked.total() == 3


def test_one_batch_asks_for_the_same_once_and_keeps_the_order(tmp_path: Path) -> None:
    judge = CountingJudge()
    requests = [request("q", steps=steps) for steps in (("abc",), ("a",), ("abc",), ("a",))]
    results = CachedJudge(judge, VerdictCache(tmp_path)).judge(requests)
    assert [result.validity for result in results if isinstance(result, Verdict)] == [(True,), (False,)] * 2
    assert judge.asked.total() == 2


def test_unjudged_is_not_kept(tmp_path: Path) -> None:
    down = CachedJudge(CountingJudge(fails=True), VerdictCache(tmp_path))
    assert down.judge([request()]) == [Unjudged("down")]
    answer = AnswerRequest(request().example, "gold")
    assert CachedAnswerJudge(CountingJudge(fails=True), VerdictCache(tmp_path)).judge_answers([answer]) == [
        Unjudged("down")
    ]
    up = CountingJudge()
    assert isinstance(CachedJudge(up, VerdictCache(tmp_path)).judge([request()])[0], Verdict)
    assert CachedAnswerJudge(up, VerdictCache(tmp_path)).judge_answers([answer]) == [True]
    assert up.asked.total() == 2


def test_a_file_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "cache")
    cache.add({"a": 1})
    shutil.rmtree(tmp_path / "cache")
    assert cache.find(["a"]) == {}
    cache.add({"b": 2})
    assert cache.find(["a", "b"]) == {"b": 2}


def test_an_unreadable_image_is_left_to_the_judge(tmp_path: Path) -> None:
    judge = CountingJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    for _ in range(2):
        assert isinstance(cached.judge([request(images=(tmp_path / "none.png",))])[0], Verdict)
    assert judge.asked.total() == 2


def test_answers(tmp_path: Path) -> None:
    example = request().example
    requests = [AnswerRequest(example, answer) for answer in ("gold", "lead", None, "gold", "\ud800")]
    judge = CountingJudge()
    expected = [True, False, False, True, False]
    assert CachedAnswerJudge(judge, VerdictCache(tmp_path)).judge_answers(requests) == expected
    assert judge.asked.total() == 4
    assert CachedAnswerJudge(judge, VerdictCache(tmp_path)).judge_answers(requests) == expected
    assert judge.asked.total() == 4


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("no database, but long enough for its header to be looked at")
    with pytest.raises(UserError, match=rf"{FILE_NAME}: .*delete the file"):
        CachedJudge(CountingJudge(), VerdictCache(tmp_path)).judge([request()])
    with pytest.raises(UserError, match="name a folder"):
        VerdictCache(tmp_path / FILE_NAME / "inner").find(["key"])


def test_a_full_disk_costs_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VerdictCache(tmp_path).add({"paid": 1})
    connect = sqlite3.connect

    def connect_to_full_disk(*args: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*args, **options)
        connection.execute("PRAGMA max_page_count = 1")  # which SQLite raises to the pages that there are
        return connection

    with monkeypatch.context() as context:
        context.setattr("sqlite3.connect", connect_to_full_disk)
        with pytest.raises(UserError, match=rf"{FILE_NAME}: .*is full; the verdicts in it are kept: make room") as told:
            VerdictCache(tmp_path).add({"next": "long " * 10_000})
    assert "delete" not in str(told.value)
    assert VerdictCache(tmp_path).find(["paid", "next"]) == {"paid": 1}


def test_a_locked_file_costs_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrpo.judge.cache._LOCK_SECONDS", 0.05)
    VerdictCache(tmp_path).add({"paid": 1})
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=rf"{FILE_NAME}: .*locked; the verdicts in it are kept: end the") as told:
            VerdictCache(tmp_path).add({"next": 2})
    assert "delete" not in str(told.value)
    assert VerdictCache(tmp_path).find(["paid", "next"]) == {"paid": 1}


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as other:
        other.execute("CREATE TABLE verdicts (of_a_court TEXT)")
    with pytest.raises(UserError, match=r"no such column.* of something else: name another"):
        VerdictCache(tmp_path).find(["key"])


class HeldJudge(CountingJudge):
    """Gives its verdicts when it is let to."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[JudgeRequest, Future[Verdict | Unjudged]]] = []
        self.is_asked = threading.Semaphore(0)

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        future: Future[Verdict | Unjudged] = Future()
        self.held.append((request, future))
        self.is_asked.release()
        return future

    def release(self) -> None:
        for request, future in self.held:
            future.set_result(self.judge_one(request))

    def close(self) -> None:
        for _, future in self.held:
            if not future.done():
                future.set_result(Unjudged("closed"))


def test_the_same_submitted_again_while_it_is_under_way_is_asked_for_once(tmp_path: Path) -> None:
    judge = HeldJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    first = cached.submit(request())
    assert judge.is_asked.acquire(timeout=30)
    second, other = cached.submit(request()), cached.submit(request("other"))
    assert judge.is_asked.acquire(timeout=30)
    assert not first.done()
    judge.release()
    assert first.result(30) == second.result(30) == judge.judge_one(request())
    assert isinstance(other.result(30), Verdict)
    assert len(judge.held) == 2
    assert cached.stats() == {"judge/cached": 0.0}
    cached.judge([request(), request()])
    assert cached.stats() == {"judge/cached": 2.0}
    assert cached.stats() == {"judge/cached": 0.0}


def test_a_verdict_is_on_disk_before_it_is_handed_out(tmp_path: Path) -> None:
    cached = CachedJudge(CountingJudge(), VerdictCache(tmp_path))
    found = []
    for number in range(20):
        cached.submit(request(f"q{number}")).result(30)
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
            found.append(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])
    assert found == list(range(1, 21))


class FaultyJudge(CountingJudge):
    """Has a fault of its own with some questions, before or after it has begun."""

    def submit(self, request: JudgeRequest) -> Future[Verdict | Unjudged]:
        if request.example.question == "at once":
            raise ArithmeticError(request.example.question)
        future: Future[Verdict | Unjudged] = Future()
        if request.example.question == "later":
            future.set_exception(ArithmeticError("later"))
        elif request.example.question == "never":
            future.cancel()
            future.set_running_or_notify_cancel()
        else:
            future.set_result(self.judge_one(request))
        return future


def test_a_fault_of_the_judge_reaches_whoever_waits_and_nobody_else(tmp_path: Path) -> None:
    cached = CachedJudge(FaultyJudge(), VerdictCache(tmp_path))
    names = ["a", "at once", "later", "never", "b"] * 3
    futures = [cached.submit(request(name)) for name in names]
    for name, future in zip(names, futures, strict=True):
        if name in ("a", "b"):
            assert isinstance(future.result(30), Verdict)
        else:
            with pytest.raises(CancelledError if name == "never" else ArithmeticError):
                future.result(30)


def test_closing_tells_whoever_waits(tmp_path: Path) -> None:
    judge = HeldJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    waiting = [cached.submit(request(f"q{number}")) for number in range(3)]
    cached.close()
    cached.close()
    assert [future.result(30) for future in waiting] == [Unjudged("closed")] * 3
    assert not VerdictCache(tmp_path).find(["anything"])


def test_a_judge_without_identity_cannot_be_told_apart() -> None:
    from mrpo.judge.cache import IdentifiedJudge

    assert isinstance(CountingJudge(), IdentifiedJudge)
    assert not isinstance(LexicalJudge(min_overlap=0.3), IdentifiedJudge)


def _work(folder: Path, start: Callable[[], Any], offset: int) -> None:
    start()
    cached = CachedJudge(CountingJudge(), VerdictCache(folder))
    for i in range(40):
        # Every question is judged by both processes, from opposite ends.
        number = i if offset == 0 else 39 - i
        cached.judge([request(f"q{number}"), request(f"only {offset} {number}")])


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_work, args=(tmp_path, barrier.wait, offset)) for offset in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    judge = CountingJudge()
    names = [name for i in range(40) for name in (f"q{i}", f"only 0 {i}", f"only 1 {i}")]
    results = CachedJudge(judge, VerdictCache(tmp_path)).judge([request(name) for name in names])
    assert results == CountingJudge().judge([request(name) for name in names])
    assert not judge.asked
