"""Work that is begun before its result is needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_thread(make: Callable[[], T], name: str) -> Future[T]:
    """What `make` gives or raises, computed in a thread called `name` that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # whoever asks for the result is told
            future.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return future
