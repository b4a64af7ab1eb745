"""Work that is begun before its result is needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

NAME = "mrpo-ahead"  # of the threads


def in_thread(make: Callable[[], T]) -> Future[T]:
    """What `make` gives or raises, computed in a thread of its own that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # whoever asks for the result is told
            future.set_exception(error)

    Thread(target=run, name=NAME, daemon=True).start()
    return future
