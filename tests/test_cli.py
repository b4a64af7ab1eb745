"""The mrpo command: what it prints, what it refuses, its exit statuses, and the launcher command it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mrpo
from mrpo.cli import COMMANDS, build_parser, main
from mrpo.commands.train import train_command
from mrpo.settings import load_config

CONFIGS = Path(__file__).parent.parent / "configs"
MRPO = [sys.executable, "-m", "mrpo.cli"]


def mrpo_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `mrpo arguments…` as a process of its own."""
    return subprocess.run(
        [*MRPO, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mrpo {mrpo.__version__}\n"


def test_without_arguments_it_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed == help_of(capsys=capsys)
    assert "examples:" in printed
    assert "exit status:" in printed


def test_help_lists_every_command_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    first_words = [line.split()[0] for line in help_of(capsys=capsys).splitlines() if line.startswith("  ")]
    assert {name.replace("_", "-") for name in COMMANDS} <= set(first_words)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """`parser` and those of all commands and actions below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_all_help_says_what_each_argument_is(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for parser in parsers(build_parser()):
        assert parser.description, parser.prog
        assert "%(" not in parser.format_help(), parser.prog
        for action in parser._actions:
            assert action.help or action.choices, (parser.prog, action.dest)


def test_start_up_imports_nothing_heavy() -> None:
    script = "import sys, mrpo.cli; mrpo.cli.build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "numpy", "pydantic", "rich", "deepspeed"} & set(done.stdout.split())


def test_config_prints_what_loads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "seed=3", "--config", str(CONFIGS / "default.yaml"), "optim.lr=1e-5"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(None, ["seed=3", "optim.lr=1e-5"])


def test_config_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert "advantage.tau" in help_of("config", capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "lr=1"], "mrpo: error: lr (command line): unknown key; did you mean optim.lr?"),
        (["config", "--cofnig", "x"], "mrpo config: error: unknown option --cofnig; did you mean --config?"),
        (["config", "--conf", "x"], "mrpo config: error: unknown option --conf; did you mean --config?"),
        (["warm-start", "extra"], "mrpo warm-start: error: unknown argument 'extra'"),
        (["train", "--num-gpus", "0"], "'0' is not a whole number of at least 1"),
        (["train", "--resume", "--overwrite"], "not allowed with argument --resume"),
        (["config", "--config", "a.yaml", "x=1", "--config=b.yaml"], "--config: given twice, as a.yaml and b.yaml"),
        (["train", "--config", "a.yaml", "--config", "b.yaml"], "--config: given twice, as a.yaml and b.yaml"),
        (["serve", "--config", "a.yaml", "--config", "b.yaml"], "--config: given twice, as a.yaml and b.yaml"),
        (["doctor", "--config", "a.yaml", "--config", "b.yaml"], "--config: given twice, as a.yaml and b.yaml"),
        (["eval", "x", "--out", "y", "--config", "a", "--config", "b"], "--config: given twice, as a and b"),
        (["nosuch"], "invalid choice: 'nosuch'"),
        (["config", "--config", "/nonexistent.yaml"], "mrpo: error: config file /nonexistent.yaml: No such file"),
    ],
)
def test_bad_input_ends_with_status_2_and_says_why(arguments: list[str], message: str) -> None:
    done = mrpo_command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_reader_that_leaves_early_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [*MRPO, "config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_ctrl_c_ends_it_with_status_130_and_no_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "config.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [*MRPO, "config", "--config", str(fifo)],
        stderr=subprocess.PIPE,
        # A shell starts background jobs with Ctrl-C ignored, which the command would inherit from this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    writer = fifo.open("w")  # returns once the command reads the file; it then waits for what is never written
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert b"Traceback" not in process.stderr.read()
    writer.close()
    process.stderr.close()


def test_train_runs_the_launcher_with_the_settings_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: ran.append([program, *arguments[1:]]))
    main(["train", "seed=0", "--num-gpus", "2", "--config", "a.yaml", "--resume", "seed=1", "optim.lr=2"])
    main(["train", "--num_gpus", "2", "--master_port", "29501", "--overwrite"])
    first, second = ran
    assert first[:5] == [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    assert Path(first[5]) == Path(mrpo.__file__).parent / "train.py"
    assert first[6:] == ["--resume", "--config", "a.yaml", "seed=0", "seed=1", "optim.lr=2"]
    assert second[3:7] == ["--num_gpus", "2", "--master_port", "29501"]
    assert second[8:] == ["--overwrite"]


def test_train_leaves_the_number_of_processes_to_the_launcher() -> None:
    assert train_command(None, 29501, ["x=1"])[3:5] == ["--master_port", "29501"]
    assert "--num_gpus" not in train_command(None, None, [])


def test_serve_prints_the_command_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["prompt.max_tokens=100", "rollout.max_tokens=20", "model.dtype=bfloat16"]
    assert main(["serve", *settings, "--port", "8123", "--print"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:4] == ["VLLM_SERVER_DEV_MODE=1", "python", "-m", "vllm.entrypoints.openai.api_server"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--max-model-len"] == "120"
    assert options["--dtype"] == "bfloat16"
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "8123")
