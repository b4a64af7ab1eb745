from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrpo.judge.stats import Tally, covered, merge_stats, overlap

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda s: (s[0], s[0] + s[1])), max_size=12)


@given(SPANS)
def test_covered_counts_every_moment_once(spans: list[tuple[int, int]]) -> None:
    moments = {moment for began, ended in spans for moment in range(began, ended)}
    assert covered(spans) == len(moments)


def test_a_tally_tells_what_happened_since_it_was_last_taken() -> None:
    tally = Tally()
    tally.add(requests=1, retries=2)
    tally.add(requests=1)
    for began, ended in ((0.0, 2.0), (1.0, 4.0), (10.0, 11.0)):
        tally.took(began, ended)
    assert tally.take(("requests", "retries", "repairs")) == {
        "judge/requests": 2.0,
        "judge/retries": 2.0,
        "judge/repairs": 0.0,
        "judge/serial_s": 6.0,
        "judge/busy_s": 5.0,
        "judge/latency_p50": 2.0,
        "judge/latency_p95": pytest.approx(np.quantile([1, 2, 3], 0.95)),
        "judge/latency_max": 3.0,
    }
    assert tally.take(("requests",)) == {"judge/requests": 0.0, "judge/serial_s": 0.0, "judge/busy_s": 0.0}


def test_overlap() -> None:
    # 64 requests of 5 s at once, and the trainer waits for the last 2 s of them.
    shares = overlap({"judge/wait_s": 2.0, "judge/busy_s": 5.0, "judge/serial_s": 320.0})
    assert shares == {"judge/hidden": pytest.approx(0.6), "judge/overlapped": pytest.approx(1 - 2 / 320)}
    assert overlap({"judge/wait_s": 0.1, "judge/busy_s": 0.0}) == {}
    assert overlap({"judge/wait_s": 0.1}) == {}
    assert overlap({"judge/wait_s": 5.1, "judge/busy_s": 5.0})["judge/hidden"] == 0.0


def test_processes_are_put_together() -> None:
    parts = [
        {"judge/requests": 10.0, "judge/cost_usd": 0.5, "judge/wait_s": 1.0, "judge/busy_s": 4.0,
         "judge/latency_p50": 1.0, "judge/latency_max": 3.0, "judge/without_gold": 0.0, "judge/hidden": 0.75},
        {"judge/requests": 6.0, "judge/cost_usd": 0.25, "judge/wait_s": 2.0, "judge/busy_s": 2.0,
         "judge/latency_p50": 2.0, "judge/latency_max": 9.0, "judge/without_gold": 0.5, "judge/hidden": 0.0},
    ]  # fmt: skip
    assert merge_stats(parts) == {
        "judge/requests": 16.0,
        "judge/cost_usd": 0.75,
        "judge/wait_s": 1.5,
        "judge/busy_s": 3.0,
        "judge/latency_p50": 1.5,
        "judge/latency_max": 9.0,
        "judge/without_gold": 0.25,
        "judge/hidden": 0.5,
    }
    assert merge_stats([{}, {}]) == {}
