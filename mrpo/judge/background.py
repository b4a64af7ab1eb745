"""An asyncio event loop in a thread of its own, for work that goes on while the program computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundLoop:
    """Runs coroutines inside `resources()`, which is entered at the first of them and left by `close`.

    The thread is a daemon: a program that dies without closing is not held up. The object must not cross a fork once
    it runs.
    """

    def __init__(self, name: str, resources: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._name, self._resources = name, resources
        self._lock = threading.Lock()
        self._running: tuple[threading.Thread, asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Starts `coroutine` in the loop; from any thread but the loop's."""
        with self._lock:
            if self._running is None:
                self._running = self._start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._running[1])

    def close(self) -> None:
        """Cancels what still runs, leaves the resources and ends the thread; a later `submit` starts anew."""
        with self._lock:
            if self._running is None:
                return
            thread, loop, stop = self._running
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            self._running = None

    def _start(self) -> tuple[threading.Thread, asyncio.AbstractEventLoop, asyncio.Event]:
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name=self._name, daemon=True)
        thread.start()
        return thread, *started.result()

    async def _serve(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        stop = asyncio.Event()
        try:
            async with self._resources():
                started.set_result((asyncio.get_running_loop(), stop))
                await stop.wait()
                tasks = asyncio.all_tasks() - {asyncio.current_task()}
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)
