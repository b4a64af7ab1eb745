"""The circuit breaker, with a clock that is set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from mrpo.judge.breaker import CircuitBreaker

Use = Callable[[bool | None], Awaitable[str | None]]


class Harness:
    def __init__(self, failures: int = 3, pause: float = 10.0, patience: float = 0.0) -> None:
        self.now = 0.0
        self.openings = 0
        self.breaker = CircuitBreaker(
            failures, pause, patience, on_open=self.count, clock=lambda: self.now, sleep=self.sleep
        )

    def count(self, reason: str) -> None:
        assert reason == "no route"
        self.openings += 1

    async def sleep(self, seconds: float) -> None:
        """Until somebody sets the clock so far ahead."""
        end = self.now + seconds
        while self.now < end:
            await asyncio.sleep(0)

    async def use(self, alive: bool | None) -> bool:
        """Whether the request was let through; then it went as `alive` says."""
        async with self.breaker.turn() as turn:
            if turn.refusal:
                assert "no route" in turn.refusal
                return False
            turn.alive, turn.reason = alive, "no route"
        return True


def test_it_opens_after_failures_in_a_row_alone() -> None:
    async def run() -> None:
        h = Harness()
        for alive in (False, False, True, False, None, False):
            assert await h.use(alive)
        assert h.openings == 0
        assert await h.use(False)
        assert h.openings == 1
        assert not await h.use(True)

    asyncio.run(run())


def test_after_the_pause_a_probe_decides() -> None:
    async def run() -> None:
        h = Harness()
        for _ in range(3):
            await h.use(False)
        h.now = 9.9
        assert not await h.use(True)
        h.now = 10.0
        assert await h.use(False)  # the probe, which fails
        h.now = 19.9
        assert not await h.use(True)
        h.now = 20.0
        assert await h.use(None)  # a probe that says nothing leaves the matter open
        assert await h.use(True)  # the next one closes it
        assert await h.use(False)
        assert h.openings == 1

    asyncio.run(run())


@pytest.mark.parametrize("alive", [True, False])
def test_others_wait_for_the_probe(alive: bool) -> None:
    async def run() -> None:
        h = Harness()
        for _ in range(3):
            await h.use(False)
        h.now = 10.0
        async with h.breaker.turn() as probe:
            others = [asyncio.create_task(h.use(True)) for _ in range(5)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in others)
            probe.alive, probe.reason = alive, "no route"
        assert await asyncio.gather(*others) == [alive] * 5

    asyncio.run(run())


def test_a_probe_that_is_cancelled_holds_nobody() -> None:
    async def run() -> None:
        h = Harness()
        for _ in range(3):
            await h.use(False)
        h.now = 10.0

        async def hang() -> None:
            async with h.breaker.turn():
                await asyncio.sleep(1000)

        probe = asyncio.create_task(hang())
        await asyncio.sleep(0)
        other = asyncio.create_task(h.use(True))
        await asyncio.sleep(0)
        probe.cancel()
        assert await asyncio.wait_for(other, 30)

    asyncio.run(run())


def test_a_probe_that_fails_after_an_older_request_succeeded_is_one_failure() -> None:
    async def run() -> None:
        h = Harness()
        async with AsyncExitStack() as older:
            straggler = await older.enter_async_context(h.breaker.turn())
            for _ in range(3):
                await h.use(False)
            h.now = 10.0
            async with h.breaker.turn() as probe:
                straggler.alive = True
                await older.aclose()
                probe.alive, probe.reason = False, "no route"
        assert await h.use(False)
        assert await h.use(False)  # the third in a row
        assert not await h.use(True)
        assert h.openings == 2

    asyncio.run(run())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_requests_wait_for_an_endpoint_that_had_answered() -> None:
    async def run() -> None:
        h = Harness(patience=25.0)
        await h.use(True)
        for _ in range(3):
            await h.use(False)
        waiting = [asyncio.create_task(h.use(True)) for _ in range(5)]
        await settle()
        assert not any(task.done() for task in waiting)
        h.now = 10.0
        await settle()
        assert all(task.done() and task.result() for task in waiting)
        assert await h.use(True)
        assert h.openings == 1

    asyncio.run(run())


def test_patience_ends_with_the_outage_and_not_with_the_request() -> None:
    async def run() -> None:
        h = Harness(patience=25.0)
        await h.use(True)
        for _ in range(3):
            await h.use(False)
        early = asyncio.create_task(h.use(False))
        for now in (10.0, 20.0):  # a probe each, which fails
            h.now = now
            await settle()
            assert await asyncio.wait_for(early, 5)
            early = asyncio.create_task(h.use(False))
        h.now = 24.0
        late = asyncio.create_task(h.use(True))
        await settle()
        assert not early.done()
        assert not late.done()
        h.now = 29.0
        assert not await h.use(True)  # who comes after the patience is refused at once
        h.now = 30.0
        await settle()
        assert early.result()
        assert not late.result()  # it waited for the probe, which failed

    asyncio.run(run())


def test_an_endpoint_that_never_answered_is_not_waited_for() -> None:
    async def run() -> None:
        h = Harness(patience=1000.0)
        for _ in range(3):
            await h.use(False)
        assert not await h.use(True)

    asyncio.run(run())


def test_zero_never_opens() -> None:
    async def run() -> None:
        h = Harness(failures=0)
        assert all([await h.use(False) for _ in range(100)])

    asyncio.run(run())
