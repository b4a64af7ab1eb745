"""Checkpoints that are either whole or absent, kept by count.

A checkpoint is written to a hidden folder, flushed to disk, and renamed into place by the main process once every
process has written its part. What a killed run leaves half written is removed at the next start.
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mrpo.config import CheckpointConfig, OptimConfig, Packing
from mrpo.errors import UserError
from mrpo.runtime import Runtime
from mrpo.whole_files import flush_folder, flush_tree

_PARTIAL = ".partial-"
_STATE = "trainer_state.json"
_TAG = "deepspeed"


@dataclass(frozen=True)
class TrainerState:
    """What a run is besides model and optimizer: everything else follows from the config and the step.

    `step` counts finished rollout steps; `score` is what `keep_best` ranks by; `world_size` the number of processes;
    `packing` how rows are packed: what `update.packing=auto` chose by the first of them.
    """

    step: int
    score: float
    world_size: int
    packing: Packing = "auto"


class CheckpointStore:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, config: CheckpointConfig, runtime: Runtime) -> None:
        self._folder = folder
        self._config = config
        self._runtime = runtime
        if runtime.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover)
        runtime.barrier()

    def save(self, engine: Any, state: TrainerState, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Writes a checkpoint of `engine`, `state` and this process's `tensors`. Every process must call this."""
        final = self._path(state.step)
        if final.exists():
            return final
        partial = self._folder / f"{_PARTIAL}{final.name}"
        engine.save_checkpoint(str(partial), tag=_TAG)
        if tensors:
            save_file(dict(tensors), partial / self._tensor_file)
        self._runtime.barrier()
        if self._runtime.is_main:
            (partial / _STATE).write_text(json.dumps(asdict(state)))
            flush_tree(partial)
            partial.rename(final)
            flush_folder(self._folder)
            self._prune()
        self._runtime.barrier()
        return final

    def load_latest(self, engine: Any) -> TrainerState | None:
        """Restores the newest checkpoint into `engine`; None if there is none. See `check_resumable`."""
        found = checkpoints(self._folder)
        if not found:
            return None
        path, state = found[-1]
        engine.load_checkpoint(str(path), tag=_TAG)
        return state

    def load_tensors(self, step: int) -> dict[str, torch.Tensor]:
        """What this process saved beside the model after `step` steps; empty if it was nothing."""
        path = self._path(step) / self._tensor_file
        return load_file(path) if path.is_file() else {}

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"

    @property
    def _tensor_file(self) -> str:
        return f"rank-{self._runtime.rank}.safetensors"

    def _prune(self) -> None:
        found = checkpoints(self._folder)
        kept = checkpoints_to_keep(found, self._config)
        for path, _ in found:
            if path not in kept:
                # Renamed first: a kill in the middle of the removal must not leave a checkpoint that looks whole.
                doomed = path.with_name(f"{_PARTIAL}{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)


def checkpoints(folder: Path) -> list[tuple[Path, TrainerState]]:
    """The whole checkpoints in `folder`, oldest first."""
    paths = sorted(folder.glob("step-*")) if folder.is_dir() else []
    return [(path, TrainerState(**json.loads((path / _STATE).read_text()))) for path in paths]


def check_resumable(folder: Path, optim: OptimConfig, total_steps: int, world_size: int) -> None:
    """Refuses to continue the run with checkpoints in `folder` by another number of processes, or to fewer steps.

    Fewer than it has done: its policy would be exported and evaluated as that of a shorter run.

    Raises:
        UserError: names both numbers.
    """
    found = checkpoints(folder)
    if not found:
        return
    path, state = found[-1]
    if state.world_size != world_size:
        raise UserError(
            f"{path} was written by {state.world_size} processes and cannot be continued by {world_size}; start the "
            "same number"
        )
    if total_steps < (done := state.step):
        asked = f"optim.steps={total_steps} is"
        if optim.steps is None:
            asked = f"optim.epochs={optim.epochs:g} makes {total_steps} steps, which is"
        raise UserError(f"--resume: {asked} below the {done} steps that are done; ask for {done} or more")


def checkpoints_to_keep(found: Sequence[tuple[Path, TrainerState]], config: CheckpointConfig) -> set[Path]:
    """Those of `found` (oldest first) that are kept: the newest and the best, which may be among the newest."""
    best = heapq.nlargest(config.keep_best, found, key=lambda item: (item[1].score, item[1].step))
    return {path for path, _ in [*found[-config.keep_last :], *best]}
