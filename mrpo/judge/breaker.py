"""A circuit breaker: an endpoint that is down is left alone for a while instead of being asked again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass
class Turn:
    """One request's turn. Whoever has it says in `alive` whether the endpoint is, or leaves None: that is unknown."""

    refusal: str | None = None  # the reason not to ask at all
    alive: bool | None = None
    reason: str = ""


class CircuitBreaker:
    """Opens after `failures` failures in a row (0: never), and lets one request through `pause` seconds later.

    While that probe is under way the others wait for its outcome: a success closes the breaker, a failure leaves it
    open for another pause. It belongs to one event loop, so it needs no lock.

    Args:
        on_open: called each time it opens, not when a probe leaves it open.
    """

    def __init__(
        self,
        failures: int,
        pause: float,
        *,
        on_open: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._pause, self._on_open, self._clock = failures, pause, on_open, clock
        self._failed_in_a_row = 0
        self._opened: float | None = None
        self._reason = ""
        self._probe: asyncio.Event | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Waits for a probe under way, then says whether to ask."""
        while self._probe is not None:
            await self._probe.wait()
        turn = Turn()
        if self._opened is None:
            yield turn
            self._take(turn, is_probe=False)
        elif self._clock() - self._opened < self._pause:
            turn.refusal = f"the judge's endpoint is down: {self._reason}"
            yield turn
        else:
            self._probe = asyncio.Event()
            try:
                yield turn
                self._take(turn, is_probe=True)
            finally:
                self._probe.set()
                self._probe = None

    def _take(self, turn: Turn, *, is_probe: bool) -> None:
        if turn.alive:
            self._failed_in_a_row, self._opened = 0, None
        elif turn.alive is False:
            self._failed_in_a_row, self._reason = self._failed_in_a_row + 1, turn.reason
            if self._opened is None and 0 < self._limit <= self._failed_in_a_row:
                self._opened = self._clock()
                self._on_open()
            elif self._opened is not None and is_probe:  # an older request's success may have closed it meanwhile
                self._opened = self._clock()
