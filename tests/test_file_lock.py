"""A lock is one process's until it lets go or dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mrpo.file_lock import lock_file

HOLD = """
import sys, time
from mrpo.file_lock import lock_file
file = open(sys.argv[1], "ab")
print(lock_file(file), flush=True)
time.sleep(600)
"""


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with path.open("ab") as file:
        assert not lock_file(file)
        killer = threading.Timer(0.3, holder.send_signal, [signal.SIGKILL])
        killer.start()
        assert lock_file(file, patience=60)
    holder.wait()
    holder.stdout.close()
    with path.open("ab") as file:
        assert lock_file(file)  # the one above was closed


def test_without_locks_of_the_file_system_all_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with (tmp_path / "lock").open("ab") as file:
        assert lock_file(file)
