from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from mrpo.judge.backoff import LONGEST_WAIT, wait_before_retry


def test_waits_double_up_to_eight_seconds() -> None:
    assert [wait_before_retry(retry, {}, 0.0) for retry in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]


def test_jitter_adds_up_to_a_quarter() -> None:
    assert wait_before_retry(1, {}, 0.5) == pytest.approx(1.125)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "17"}, 17.0),
        ({"retry-after": "0.7"}, 0.7),
        ({"retry-after": "0"}, 0.5),  # the server's word is a lower bound
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "soon"}, 0.5),
        ({"retry-after": f"{LONGEST_WAIT + 1}"}, None),
        ({"retry-after": "inf"}, None),
    ],
)
def test_retry_after(headers: dict[str, str], expected: float | None) -> None:
    assert wait_before_retry(0, headers, 0.0) == expected


def test_retry_after_a_date() -> None:
    wait = wait_before_retry(0, {"retry-after": formatdate(time.time() + 30, usegmt=True)}, 0.0)
    assert wait is not None
    assert 25.0 < wait < 31.0
    assert wait_before_retry(0, {"retry-after": formatdate(0.0, usegmt=True)}, 0.0) == 0.5


def test_not_a_number_is_no_wait() -> None:
    assert wait_before_retry(0, {"retry-after": "nan"}, 0.0) == 0.5
