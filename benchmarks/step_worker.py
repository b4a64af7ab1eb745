"""One process of one way: waits for commands in a folder, carries them out, and leaves answers beside them.

Commands are files N.json, answers N.RANK.json, so that they pass any launcher. A worker ends when it is told to, or
when the process that commands it is gone.

usage: step_worker.py WAY FOLDER PID [--local_rank N]
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before OpenMP starts: a waiting thread that spins takes the core of a working one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from harness import free_memory
from step_setting import AHEAD, OURS, REFERENCE, TRL, Setting
from step_way import Sampled, Stepping, Way

_POLL = 0.005


class Mailbox:
    """Commands to this process, in order."""

    def __init__(self, folder: Path, rank: int, commander: int) -> None:
        self._folder, self._rank, self._commander = folder, rank, commander
        self._number = 0

    def look(self) -> dict[str, Any]:
        """The next command; it stays the next one until it is answered."""
        path = self._folder / f"{self._number}.json"
        while not path.exists():
            try:
                os.kill(self._commander, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(_POLL)
        return json.loads(path.read_text(encoding="utf-8"))

    def answer(self, content: dict[str, Any]) -> None:
        path = self._folder / f"{self._number}.{self._rank}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.rename(path)
        self._number += 1


class Worker:
    """Carries out commands with one way."""

    def __init__(self, name: str, mailbox: Mailbox, folder: Path) -> None:
        self._name, self._mailbox, self._folder = name, mailbox, folder
        self._way = make_way(name)

    def serve(self) -> None:
        while (command := self._mailbox.look())["do"] != "end":
            try:
                if command["do"] == "step":
                    self._steps()
                else:
                    self._mailbox.answer(getattr(self, f"_{command['do']}")(command))
            except Exception as error:
                traceback.print_exc()
                self._mailbox.answer({"failure": f"{type(error).__name__}: {error}"})
        self._way.close()

    def _prepare(self, command: dict[str, Any]) -> dict[str, Any]:
        self._way.prepare(Setting(**command["setting"]), self._folder)
        free_memory()
        return {}

    def _gradients(self, command: dict[str, Any]) -> dict[str, Any]:
        sampled = [Sampled(**one) for one in torch.load(command["sampled"])]
        found = self._way.gradients(sampled)
        torch.save(dict(found), command["path"])
        return {}

    def _steps(self) -> None:
        """Steps as long as they are asked for: TRL's loop cannot be left between them."""
        from_trl = getattr(self._way, "run", None)
        if from_trl is not None:
            from_trl(self._may_begin, self._tell)
        else:
            self._may_begin()
            command, way = self._mailbox.look(), self._way
            self._tell(_stepping(way).step(command["algorithm"], command["index"]))

    def _may_begin(self) -> bool:
        if self._mailbox.look()["do"] != "step":
            return False
        _forget_peak()
        return True

    def _tell(self, found: dict[str, float]) -> None:
        self._mailbox.answer(found | {"peak": float(_peak())})


def _stepping(way: Any) -> Stepping:
    return way


def make_way(name: str) -> Way:
    """The way of this name; only what it needs is imported."""
    makers: dict[str, Callable[[], Way]] = {OURS: _ours, AHEAD: _ahead, TRL: _trl, REFERENCE: _reference}
    return makers[name]()


def _ours() -> Way:
    from step_ours import OurWay

    from mrpo.runtime import Runtime

    return OurWay(OURS, Runtime.start(seed=0))


def _ahead() -> Way:
    from step_ours import OurWay

    from mrpo.runtime import Runtime

    return OurWay(AHEAD, Runtime.start(seed=0))


def _trl() -> Way:
    from step_trl import TrlWay

    return TrlWay()


def _reference() -> Way:
    from step_reference import ReferenceWay

    return ReferenceWay()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes: of a GPU all that is taken, vLLM's share among it; of a CPU the most that this process held."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    from harness import _resident

    return _resident("VmHWM")


def main() -> None:
    name, folder, commander = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    mailbox = Mailbox(Path(folder), int(os.environ.get("RANK", "0")), int(commander))
    Worker(name, mailbox, Path(folder)).serve()
    sys.stdout.flush()
    # ZeRO's and vLLM's threads can abort an interpreter that shuts down in the ordinary way.
    os._exit(0)


if __name__ == "__main__":
    main()
