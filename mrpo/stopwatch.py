"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds of named stages, summed until they are taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str, apart_from: Sequence[str] = ()) -> Iterator[None]:
        """Adds the time that the block takes to `stage`, whether it ends well or not.

        Args:
            apart_from: stages measured inside of the block, whose time there does not count for this one.
        """
        began, before = time.perf_counter(), self._sum(apart_from)
        try:
            yield
        finally:
            other = self._sum(apart_from) - before
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - began - other

    def _sum(self, stages: Sequence[str]) -> float:
        return sum(self._seconds.get(stage, 0.0) for stage in stages)

    def take(self) -> dict[str, float]:
        """The seconds of every stage since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds
