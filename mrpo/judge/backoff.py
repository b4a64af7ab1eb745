"""How long to wait before a failed request is tried again.

Written here, and not left to the openai package, because that bounds only the time between two bytes of an answer: a
server that drips would hold one of its tries for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
_FIRST, _LONGEST_BACKOFF, _JITTER = 0.5, 8.0, 0.25


def wait_before_retry(retry: int, headers: Mapping[str, str], jitter: float) -> float | None:
    """Seconds until the retry with number `retry` (from 0); None: not at all.

    0.5 s doubled each time up to 8 s, or what the answer's Retry-After (seconds or a date) or retry-after-ms says if
    that is longer, and up to a quarter more so that many clients do not come back at once.

    Args:
        headers: of the answer, with case ignored; empty if there was none.
        jitter: a random number in [0, 1).
    """
    told = _told(headers)
    if told > LONGEST_WAIT:
        return None
    return max(told, min(_FIRST * 2.0**retry, _LONGEST_BACKOFF)) * (1.0 + _JITTER * jitter)


def _told(headers: Mapping[str, str]) -> float:
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) * unit)  # not a number: 0
    try:
        return parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except (KeyError, ValueError):
        return 0.0
