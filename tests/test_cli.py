"""The mrpo command: what it prints, what it refuses, and the launcher command it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import mrpo
from mrpo.cli import main, train_command
from mrpo.settings import load_config

CONFIGS = Path(__file__).parent.parent / "configs"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mrpo {mrpo.__version__}\n"


def test_config_prints_what_loads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "seed=3", "--config", str(CONFIGS / "default.yaml"), "optim.lr=1e-5"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(None, ["seed=3", "optim.lr=1e-5"])


def test_config_refuses_bad_input_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "lr=1"]) == 2
    assert capsys.readouterr().err == "mrpo: error: lr (command line): unknown key; did you mean optim.lr?\n"


def test_config_refuses_unknown_options() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["config", "--nosuch"])
    assert caught.value.code == 2


def test_config_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["config", "--help"])
    assert "advantage.tau" in capsys.readouterr().out


def test_train_runs_the_launcher_with_the_arguments_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: ran.append([program, *arguments[1:]]))
    main(["train", "--num-gpus", "2", "--config", "a.yaml", "--resume", "seed=1", "optim.lr=2"])
    (command,) = ran
    assert command[:5] == [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    assert Path(command[5]) == Path(mrpo.__file__).parent / "train.py"
    assert command[6:] == ["--config", "a.yaml", "--resume", "seed=1", "optim.lr=2"]


def test_train_leaves_the_number_of_processes_to_the_launcher() -> None:
    assert train_command(None, 29501, ["x=1"])[3:5] == ["--master_port", "29501"]
    assert "--num_gpus" not in train_command(None, None, [])
