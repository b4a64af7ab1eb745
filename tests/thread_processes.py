"""Processes that are threads here: what `mrpo.runtime.Runtime` does with several of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Meeting:
    """Where threads exchange objects, as processes do."""

    size: int
    items: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=30)

    def gather(self, rank: int, item: Any) -> list[Any]:
        self.items[rank] = item
        self.barrier.wait()
        found = list(self.items)
        self.barrier.wait()
        return found


@dataclass
class ThreadRuntime:
    rank: int
    meeting: Meeting
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.meeting.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        self.gather_objects(None)

    def gather_objects(self, item: Any) -> list[Any]:
        return self.meeting.gather(self.rank, item)

    def exchange(self, outgoing: Sequence[Any]) -> list[Any]:
        return [sent[self.rank] for sent in self.gather_objects(list(outgoing))]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.gather_objects(rows))

    def any(self, flag: bool) -> bool:
        return any(self.gather_objects(flag))
