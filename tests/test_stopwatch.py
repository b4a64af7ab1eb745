"""Where the time of a step goes."""

from __future__ import annotations

import time

import pytest

from mrpo.stopwatch import Stopwatch


def test_a_stage_can_leave_out_what_others_took_inside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch()
    with watch.measure("wait"):
        now += 1
    with watch.measure("step"), watch.measure("update", apart_from=("wait", "rewards")):
        now += 2
        with watch.measure("rewards"):
            now += 16
        for _ in range(2):
            with watch.measure("wait"):
                now += 4
    with watch.measure("update", apart_from=("wait", "rewards")):
        now += 8
    assert watch.take() == {"wait": 9, "rewards": 16, "step": 26, "update": 10}
    assert watch.take() == {}


def test_a_stage_that_fails_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((1.0, 3.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.measure("update"):
        raise KeyError
    assert watch.take() == {"update": 2}
