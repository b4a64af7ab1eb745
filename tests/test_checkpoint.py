"""Which checkpoints are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from mrpo.checkpoint import TrainerState, checkpoints_to_keep
from mrpo.config import CheckpointConfig


@pytest.mark.parametrize(
    ("scores", "keep_last", "keep_best", "kept"),
    [
        ([3.0], 1, 3, {1}),
        ([3.0, 2.0], 1, 3, {1, 2}),  # fewer than are to be kept
        ([3.0, 2.0, 1.0], 1, 3, {1, 2, 3}),
        ([3.0, 2.0, 1.0, 0.0], 1, 3, {1, 2, 3, 4}),
        ([0.0, 3.0, 2.0, 4.0], 1, 3, {2, 3, 4}),  # the newest is the best
        ([1.0, 3.0, 2.0, 0.0], 2, 0, {3, 4}),
        ([1.0, 1.0, 0.0], 1, 1, {2, 3}),  # of equally good ones the newer
    ],
)
def test_the_newest_and_the_best_are_kept(scores: list[float], keep_last: int, keep_best: int, kept: set[int]) -> None:
    found = [(Path(f"step-{step}"), TrainerState(step, score, 1)) for step, score in enumerate(scores, start=1)]
    config = CheckpointConfig(keep_last=keep_last, keep_best=keep_best)
    assert checkpoints_to_keep(found, config) == {Path(f"step-{step}") for step in kept}


def test_none_of_the_best_goes_while_checkpoints_come_one_by_one() -> None:
    config = CheckpointConfig(keep_last=1, keep_best=3)
    found: list[tuple[Path, TrainerState]] = []
    for step in range(1, 7):  # each worse than the one before
        found.append((Path(f"step-{step}"), TrainerState(step, -float(step), 1)))
        kept = checkpoints_to_keep(found, config)
        found = [item for item in found if item[0] in kept]
    assert [state.step for _, state in found] == [1, 2, 3, 6]
