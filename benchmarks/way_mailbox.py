"""The other end of a `WayProcess`: commands from a folder, answers beside them, and the memory a process holds.

Commands are files N.json, answers N.RANK.json, so that they pass any launcher. A process ends when it is told to, or
when the one that commands it is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from harness import _resident

_POLL, _WATCH = 0.005, 1.0  # seconds


class Worker(Protocol):
    """What carries out the commands of one way."""

    def carry_out(self, command: dict[str, Any]) -> dict[str, Any] | None: ...

    def close(self) -> None: ...


class Mailbox:
    """Commands to this process, in order."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._number = 0

    def look(self) -> dict[str, Any]:
        """The next command; it stays the next one until it is answered."""
        path = self._folder / f"{self._number}.json"
        while not path.exists():
            time.sleep(_POLL)
        return json.loads(path.read_text(encoding="utf-8"))

    def answer(self, content: dict[str, Any]) -> None:
        path = self._folder / f"{self._number}.{self._rank}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.rename(path)
        self._number += 1

    def serve(self, carry_out: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Carries out commands until the one to end; an answer of None: it was given already."""
        while (command := self.look())["do"] != "end":
            try:
                content = carry_out(command)
            except Exception as error:
                traceback.print_exc()
                content = {"failure": f"{type(error).__name__}: {error}"}
            if content is not None:
                self.answer(content)


def _end_with(commander: int) -> None:
    """Ends this process, whatever it is at, when `commander` is gone or dead: a GPU's memory is not to be held on."""
    while True:
        try:
            status = Path(f"/proc/{commander}/stat").read_text(encoding="utf-8")
        except OSError:
            os._exit(1)
        if status.rpartition(")")[2].split()[0] in "ZX":  # dead, but nobody has asked how it ended
            os._exit(1)
        time.sleep(_WATCH)


def run_way(make: Callable[[str, Mailbox, Path], Worker]) -> None:
    """What a script of a way does. usage: SCRIPT WAY FOLDER PID [--local_rank N]"""
    name, folder, commander = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    threading.Thread(target=_end_with, args=[int(commander)], daemon=True).start()
    mailbox = Mailbox(Path(folder), int(os.environ.get("RANK", "0")))
    worker = make(name, mailbox, Path(folder))
    mailbox.serve(worker.carry_out)
    worker.close()
    sys.stdout.flush()
    # ZeRO's and vLLM's threads can abort an interpreter that shuts down in the ordinary way.
    os._exit(0)


def forget_peak() -> None:
    """`peak` begins anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes: of a GPU all that is taken, vLLM's share among it; of a CPU the most that this process held."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return _resident("VmHWM")
