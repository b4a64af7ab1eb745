"""The completion scripts, sourced by real shells."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mrpo.cli import build_parser, main
from mrpo.commands.completion import SHELLS, completion_script, setting_values

# What readline does: the line, the cursor, and the words, of which `=` is one.
_ASK = """
source {script}
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
$(complete -p mrpo | sed 's/.*-F \\([^ ]*\\).*/\\1/') 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="session")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "mrpo.bash"
    path.write_text(completion_script(build_parser(), "bash"))
    return path


def complete(script: Path, line: str, folder: Path | None = None) -> set[str]:
    """What bash offers at the end of `line`."""
    words = [part for word in line.split(" ") for part in word.replace("=", " = ").split(" ")] if "=" in line else None
    given = words or line.split(" ")
    text = _ASK.format(script=script, line=shlex.quote(line), words=" ".join(map(shlex.quote, given)))
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=30, check=True, cwd=folder)
    return set(filter(None, done.stdout.splitlines()))


def test_bash_completes_commands_and_their_actions(bash_script: Path) -> None:
    assert complete(bash_script, "mrpo ") >= {"doctor", "data", "train", "warm-start", "completion"}
    assert complete(bash_script, "mrpo w") == {"warm-start"}
    assert complete(bash_script, "mrpo data ") >= {"prepare", "show", "check"}
    assert complete(bash_script, "mrpo completion ") == set(SHELLS)


def test_bash_completes_options_of_the_command_alone(bash_script: Path) -> None:
    offered = complete(bash_script, "mrpo train --")
    assert offered >= {"--config", "--num-gpus", "--resume", "--overwrite"}
    assert "--num_gpus" not in offered
    assert "--resume" not in complete(bash_script, "mrpo config --")


def test_bash_completes_settings_and_their_values(bash_script: Path) -> None:
    assert complete(bash_script, "mrpo train optim.sch") == {"optim.schedule="}
    assert complete(bash_script, "mrpo train seed=1 --resume optim.be") == {"optim.beta1=", "optim.beta2="}
    assert complete(bash_script, "mrpo doctor optim.schedule=") == {"constant", "linear", "cosine"}
    assert complete(bash_script, "mrpo config optim.schedule=co") == {"constant", "cosine"}
    assert complete(bash_script, "mrpo train model.freeze_vision=t") == {"true"}
    assert complete(bash_script, "mrpo train optim.lr=") == set()


def test_bash_completes_files_and_folders(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch()
    (tmp_path / "runs").mkdir()
    assert complete(bash_script, "mrpo train --config ru", tmp_path) == {"run.yaml", "runs"}
    assert complete(bash_script, "mrpo warm-start --out ru", tmp_path) == {"runs"}
    assert complete(bash_script, "mrpo train output_dir=ru", tmp_path) == {"run.yaml", "runs"}


def test_bash_completes_a_name_with_a_space_as_one(bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "run one *.yaml").touch()
    (tmp_path / "run two").mkdir()
    assert complete(bash_script, "mrpo train output_dir=ru", tmp_path) == {"run one *.yaml", "run two"}
    assert complete(bash_script, "mrpo train output_dir=x", tmp_path) == set()


def test_values_of_settings() -> None:
    values = setting_values()
    assert values["algorithm"] == ["mrpo", "grpo", "gdpo", "sft"]
    assert values["deepspeed.zero_stage"] == ["0", "1", "2", "3"]
    assert values["optim.steps"] == ["null"]
    assert values["data.root"] == values["model.path"] == ["FILES"]
    assert values["optim.lr"] == values["judge.model"] == []


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mrpo wa", {"warm-start"}),
        ("mrpo train --resu", {"--resume"}),
        ("mrpo train seed=1 optim.sch", {"optim.schedule="}),
        ("mrpo train optim.schedule=co", {"optim.schedule=constant", "optim.schedule=cosine"}),
    ],
)
def test_fish_completes(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "mrpo.fish").write_text(completion_script(build_parser(), "fish"))
    command = f"source {tmp_path / 'mrpo.fish'}; complete -C {shlex.quote(line)}"
    done = subprocess.run(["fish", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert {offer.split("\t")[0] for offer in done.stdout.splitlines()} == expected


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_reads_the_script(tmp_path: Path) -> None:
    (tmp_path / "_mrpo").write_text(completion_script(build_parser(), "zsh"))
    subprocess.run(["zsh", "-n", str(tmp_path / "_mrpo")], timeout=30, check=True)
    ask = f"compdef() {{ :; }}; source {tmp_path / '_mrpo'}; _mrpo_values optim.schedule"
    done = subprocess.run(["zsh", "-fc", ask], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split() == ["constant", "linear", "cosine"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == completion_script(build_parser(), shell)


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["completion", "cmd.exe"])
    assert caught.value.code == 2
    assert "bash" in capsys.readouterr().err
