"""Processes that are killed while they keep verdicts: what was handed out is kept, what was half-written is not."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import pytest

from mrpo.judge import EmbeddedJudge
from mrpo.judge.cache import FILE_NAME, CachedJudge, VerdictCache
from mrpo.records import Example, JudgeRequest, StepVerdict, Verdict

WRITERS = 3
LENGTH = 40_000  # of a reason: a verdict takes ten pages of the file, which are not written at once


def verdict(question: str) -> Verdict:
    return Verdict((StepVerdict(True, False, question.ljust(LENGTH, ".")),))


class LongWindedJudge(EmbeddedJudge):
    name = identity = "long-winded"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def judge_one(self, request: JudgeRequest) -> Verdict:
        self.asked.append(request.example.question)
        return verdict(request.example.question)


def requests(questions: Sequence[str]) -> list[JudgeRequest]:
    return [
        JudgeRequest(Example("1", (), question, "gold", "why", "test"), ("step",), "gold") for question in questions
    ]


def batch(writer: int, number: int) -> list[str]:
    """The questions of a writer's batch: one that all writers have, and three of its own."""
    return [f"all {number}", *(f"{writer} {number} {i}" for i in range(3))]


def write_until_killed(folder: Path, writer: int, told: int) -> None:
    """Writes a line to the pipe `told` when it has been told a whole batch of verdicts."""
    judge = CachedJudge(LongWindedJudge(), VerdictCache(folder))
    for number in itertools.count():
        judge.judge(requests(batch(writer, number)))
        os.write(told, f"{writer} {number}\n".encode())  # short enough to arrive whole


@contextmanager
def running_writers(folder: Path) -> Iterator[tuple[list[BaseProcess], TextIO]]:
    """Processes that write verdicts, and what they tell, which ends when the last of them has."""
    reading, writing = os.pipe()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_until_killed, args=(folder, n, writing)) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    os.close(writing)
    try:
        with open(reading) as told:
            yield list(writers), told
    finally:
        for writer in writers:
            writer.kill()
            writer.join()


def stop_in_the_middle(writers: Sequence[BaseProcess], journal: Path) -> None:
    """Stops the writers at a moment at which one of them is about to write to the file, or has begun."""
    for _ in range(3_000):
        for writer in writers:
            os.kill(pid(writer), signal.SIGSTOP)
        assert all(os.WIFSTOPPED(os.waitpid(pid(writer), os.WUNTRACED)[1]) for writer in writers)
        if is_hot(journal):
            return
        resume(writers)
        time.sleep(0.001)
    raise AssertionError("nobody writes")


def is_hot(journal: Path) -> bool:
    """Whether the next to open the file must undo what was written: the journal counts pages once they are on disk."""
    try:
        return int.from_bytes(journal.read_bytes()[8:12], "big") > 0
    except FileNotFoundError:
        return False


def resume(writers: Sequence[BaseProcess]) -> None:
    for writer in writers:
        os.kill(pid(writer), signal.SIGCONT)


def pid(process: BaseProcess) -> int:
    assert process.pid is not None
    return process.pid


@pytest.mark.parametrize("seed", range(5))
def test_kills_while_several_processes_write(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    lines: list[str] = []
    with running_writers(tmp_path) as (writers, told):
        while writers:  # the others go on while one has died
            lines += [told.readline() for _ in range(draw.randrange(1, 8))]
            stop_in_the_middle(writers, tmp_path / f"{FILE_NAME}-journal")
            writers.pop(draw.randrange(len(writers))).kill()
            resume(writers)
        lines += told.readlines()
    assert is_hot(tmp_path / f"{FILE_NAME}-journal")

    done = {(int(writer), int(number)) for writer, number in map(str.split, lines)}
    answered = {question for writer, number in done for question in batch(writer, number)}
    next_ones = [(writer, sum(w == writer for w, _ in done)) for writer in range(WRITERS)]
    under_way = {question for writer, number in next_ones for question in batch(writer, number)} - answered

    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (kept,) = connection.execute("SELECT count(*) FROM verdicts").fetchone()
    judge = LongWindedJudge()
    cached = CachedJudge(judge, VerdictCache(tmp_path))
    for questions in (sorted(answered), sorted(under_way)):
        assert cached.judge(requests(questions)) == [verdict(question) for question in questions]
    assert set(judge.asked) <= under_way
    assert kept == len(answered | under_way) - len(judge.asked)
