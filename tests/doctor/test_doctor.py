"""`mrpo doctor` as a whole: on this machine, on configurations that cannot run, as lines and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mrpo.cli import main
from mrpo.doctor.check import Check, attempt, gib, guarded
from mrpo.doctor.inputs import Data, check_batch, check_data, check_output
from mrpo.errors import UserError
from mrpo.records import Example
from mrpo.settings import load_config, to_yaml


def states(printed: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["state"] for check in printed["checks"]}


def test_the_default_configuration_can_run_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"output_dir={tmp_path / 'run'}"]) == 0
    printed = capsys.readouterr().out
    assert "This configuration can run here." in printed
    assert "phantom: 20,000 training and 512 held-out questions" in printed
    assert "AdamW: 1.25 M x 8 B (two moments) = 10 MiB" in printed
    assert "missing" not in printed


def test_a_file_gets_plain_whole_lines_even_where_colour_is_forced(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    command = [sys.executable, "-m", "mrpo.cli", "doctor", f"output_dir={folder}"]
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "\x1b" not in done.stdout
    assert any(str(folder) in line for line in done.stdout.splitlines())


def test_what_is_missing_ends_it_with_status_1(tmp_path: Path) -> None:
    settings = [
        f"output_dir={tmp_path / 'run'}",
        "model.path=/no/such/folder",
        "judge.kind=openai",
        "judge.api_key_env=UNSET_1",
    ]
    command = [sys.executable, "-m", "mrpo.cli", "doctor", "--json", "--num-gpus", "3", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    printed = json.loads(done.stdout)
    assert printed["can_run"] is False
    found = states(printed)
    assert found["model"] == found["judge"] == found["batch"] == "missing"  # 16 prompts for 3 processes
    assert found["data"] == found["output_dir"] == found["Python"] == "ok"
    (judge,) = (check for check in printed["checks"] if check["name"] == "judge")
    assert judge["remedy"] == "export UNSET_1=KEY"
    assert set(judge) == {"topic", "name", "state", "fact", "remedy", "details"}


def test_a_broken_model_folder_and_data_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{")
    settings = [f"model.path={model}", "data.name=vqa_rad", f"data.root={tmp_path / 'nowhere'}"]
    assert main(["doctor", f"output_dir={tmp_path / 'run'}", *settings]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "This configuration cannot run here; missing: model, data."


def test_bad_settings_end_it_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "nosuch=1"]) == 2
    assert "nosuch" in capsys.readouterr().err


def test_one_broken_check_does_not_hide_the_others() -> None:
    def fail() -> Check:
        raise RuntimeError("first line\nsecond line")

    def refuse() -> Check:
        raise UserError("model.path=x: there is no such folder")

    assert guarded("a", fail) == Check("a", "missing", "RuntimeError: first line")
    assert guarded("a", refuse, "mend it") == Check("a", "missing", "model.path=x: there is no such folder", "mend it")
    assert attempt("a", lambda: 3) == (3, None)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (5 * 2**20, "5 MiB"), (2**29, "0.5 GiB"), (80 * 2**30, "80.0 GiB")]
)
def test_sizes_in_words(size: int, text: str) -> None:
    assert gib(size) == text


@pytest.mark.parametrize(
    ("processes", "remedy"),
    [(1, None), (4, None), (16, None), (3, "optim.batch_size=144"), (32, "optim.batch_size=256")],
)
def test_processes_must_share_the_prompts_evenly(processes: int, remedy: str | None) -> None:
    check = check_batch(load_config(), processes)  # 128 completions: 16 prompts x 8
    assert check.remedy == remedy
    if remedy:
        assert check_batch(load_config(None, [remedy]), processes).state == "ok"


def test_sft_needs_rationales_and_leaves_out_questions_without_one() -> None:
    def example(rationale: str | None) -> Example:
        return Example("id", (), "Where?", "lung", rationale, "train")

    config = load_config(None, ["algorithm=sft"])
    check = check_data(config, Data([example(None), example("A lung.")], ()))
    assert (check.state, check.fact.endswith("sft leaves out 1 without a gold rationale")) == ("warning", True)
    assert check_data(config, Data([example(None)], ())).state == "missing"
    assert check_data(config, Data([example("A lung.")], ())).state == "ok"


def test_the_output_folder(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path / 'run'}"])
    assert check_output(config).state == "ok"
    config.output_dir.mkdir()
    assert check_output(config).state == "ok"
    (config.output_dir / "notes.txt").touch()
    assert check_output(config).state == "missing"
    (config.output_dir / "config.yaml").write_text("title: my site\n")
    assert check_output(config).state == "missing"
    (config.output_dir / "config.yaml").write_text(to_yaml(config))
    assert check_output(config).state == "warning"
    assert check_output(load_config(None, [f"output_dir={config.output_dir / 'notes.txt'}"])).state == "missing"
