"""A circuit breaker: an endpoint that is down is left alone for a while instead of being asked again and again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
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
    open for another pause. Meanwhile requests are refused; but if the endpoint had answered before, they wait until it
    has been down for `patience` seconds: an outage is no reason to go without verdicts, a wrong address is. It belongs
    to one event loop, so it needs no lock.

    Args:
        on_open: called with the reason each time it opens, not when a probe leaves it open.
    """

    def __init__(
        self,
        failures: int,
        pause: float,
        patience: float = 0.0,
        *,
        on_open: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._limit, self._pause, self._patience, self._on_open = failures, pause, patience, on_open
        self._clock, self._sleep = clock, sleep
        self._failed_in_a_row = 0
        self._has_answered = False
        self._down_since = 0.0
        self._opened: float | None = None
        self._reason = ""
        self._probe: asyncio.Event | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Turn]:
        """Waits for a probe under way or the end of an outage, then says whether to ask."""
        while self._probe is not None or (self.is_waited_for and self._until_probe > 0):
            await (self._probe.wait() if self._probe is not None else self._sleep(self._until_probe))
        turn = Turn()
        if self._opened is None:
            yield turn
            self._take(turn, is_probe=False)
        elif self._until_probe > 0:
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

    @property
    def is_waited_for(self) -> bool:
        """Whether the endpoint is down, but not for so long that requests are refused."""
        return self._opened is not None and self._has_answered and self._clock() < self._down_since + self._patience

    @property
    def _until_probe(self) -> float:
        """Seconds; only while it is open."""
        assert self._opened is not None
        return self._opened + self._pause - self._clock()

    def _take(self, turn: Turn, *, is_probe: bool) -> None:
        if turn.alive:
            self._failed_in_a_row, self._opened, self._has_answered = 0, None, True
        elif turn.alive is False:
            self._failed_in_a_row, self._reason = self._failed_in_a_row + 1, turn.reason
            if self._opened is None and 0 < self._limit <= self._failed_in_a_row:
                self._opened = self._down_since = self._clock()
                self._on_open(self._reason)
            elif self._opened is not None and is_probe:  # an older request's success may have closed it meanwhile
                self._opened = self._clock()
