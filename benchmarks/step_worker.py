"""One process of one way of a whole step.

usage: step_worker.py WAY FOLDER PID [--local_rank N]
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before OpenMP starts, as in mrpo/train.py: a waiting thread spins briefly, then sleeps.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from harness import free_memory
from step_setting import AHEAD, OURS, REFERENCE, TRL, Setting
from step_way import Sampled, Stepping, Way
from way_mailbox import Mailbox, forget_peak, peak, run_way


class Worker:
    """Carries out commands with one way."""

    def __init__(self, name: str, mailbox: Mailbox, folder: Path) -> None:
        self._name, self._mailbox, self._folder = name, mailbox, folder
        self._way = make_way(name)

    def carry_out(self, command: dict[str, Any]) -> dict[str, Any] | None:
        if command["do"] == "step":
            self._steps()
            return None
        return getattr(self, f"_{command['do']}")(command)

    def close(self) -> None:
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
        forget_peak()
        return True

    def _tell(self, found: dict[str, float]) -> None:
        self._mailbox.answer(found | {"peak": float(peak())})


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


if __name__ == "__main__":
    run_way(Worker)
