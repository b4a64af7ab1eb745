"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds of named stages, summed until they are taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str, apart_from: str = "") -> Iterator[None]:
        """Adds the time that the block takes to `stage`, whether it ends well or not.

        Args:
            apart_from: a stage measured inside of the block, whose time there does not count for this one.
        """
        began, before = time.perf_counter(), self._seconds.get(apart_from, 0.0)
        try:
            yield
        finally:
            other = self._seconds.get(apart_from, 0.0) - before
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - began - other

    def take(self) -> dict[str, float]:
        """The seconds of every stage since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
