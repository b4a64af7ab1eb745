"""Locks on files: at most one process writes what a file stands for. The system drops a lock when its holder dies."""

from __future__ import annotations

import fcntl
import time
from typing import IO

_PAUSE = 0.1


def lock_file(file: IO[bytes], patience: float = 0.0) -> bool:
    """Whether `file` is this process's now, until it is closed; if not, another one has held it for `patience` seconds.

    Also true on file systems that have no locks.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE)
        except OSError:  # some network file systems have no locks
            return True
        else:
            return True
