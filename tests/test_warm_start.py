"""What is told before the warm start is trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mrpo.errors import UserError
from mrpo.warm_start import make_warm_start


def train_command(started: Path) -> list[str]:
    """A training run that leaves a file and fails."""
    return [sys.executable, "-c", f"import pathlib, sys; pathlib.Path({str(started)!r}).touch(); sys.exit(3)"]


def refusal(target: Path, started: Path) -> str:
    with pytest.raises(UserError) as error:
        make_warm_start(target, train_command(started))
    return str(error.value)


def test_a_folder_that_cannot_be_written_is_told_before_any_training(tmp_path: Path) -> None:
    started, file = tmp_path / "started", tmp_path / "file"
    file.touch()
    for target in (file, file / "inner"):
        assert f"{target} cannot be written: " in refusal(target, started)
    assert not started.exists()


def test_a_folder_that_takes_no_files_is_told_before_any_training(tmp_path: Path) -> None:
    started = tmp_path / "started"
    assert "/proc cannot be written: " in refusal(Path("/proc"), started)  # it is there, and not even root writes to it
    assert not started.exists()


def test_a_folder_that_can_be_written_is_left_as_it_was_until_the_training_is_done(tmp_path: Path) -> None:
    started, target = tmp_path / "started", tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old")
    assert "ended with status 3" in refusal(target, started)
    assert started.exists()
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "old"}
