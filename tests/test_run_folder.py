"""The folder of a run: what is refused, what is removed, and that one run at a time is in it."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_processes import Meeting, ThreadRuntime

from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.run_folder import check_folder, holds_run, prepared_folder, remove_run
from mrpo.runtime import Runtime
from mrpo.settings import load_config, to_yaml


class Alone(Runtime):
    """The only process, in no process group."""

    def barrier(self) -> None:
        pass

    def gather_objects(self, item: Any) -> list[Any]:
        return [item]


ALONE = Alone(0, 1, torch.device("cpu"))


def config_in(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"output_dir={folder}", *overrides])


def prepare(config: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    with prepared_folder(config, ALONE, resume=resume, overwrite=overwrite, patience=0.2):
        pass


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def die(*_: object) -> None:
    raise KeyboardInterrupt


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_an_existing_run_is_neither_mixed_nor_lost(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    write(tmp_path, "notes.txt")
    with pytest.raises(UserError, match="not empty and holds no run"):
        check_folder(config, resume=False, overwrite=False)
    with pytest.raises(UserError, match="not empty and holds no run"):
        check_folder(config, resume=False, overwrite=True)
    with pytest.raises(UserError, match="holds no run to resume"):
        check_folder(config, resume=True, overwrite=False)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(config, resume=False, overwrite=False)
    check_folder(config, resume=True, overwrite=False)
    check_folder(config, resume=False, overwrite=True)
    other = config_in(tmp_path, "optim.lr=0.5", "log.samples=9")
    with pytest.raises(UserError, match=r"optim\.lr=0\.5 \(was 0\.0001\)$"):
        check_folder(other, resume=True, overwrite=False)


def test_a_run_goes_on_with_smaller_batches_of_completions_and_a_judge_that_has_moved(tmp_path: Path) -> None:
    judge = ("judge.kind=openai", "judge.model=m")
    prepare(config_in(tmp_path, *judge, "judge.base_url=http://node-1:8000/v1"))
    moved = (*judge, "judge.base_url=http://node-2:8000/v1", "rollout.batch_size=16")
    prepare(config_in(tmp_path, *moved), resume=True)
    assert load_config(tmp_path / "config.yaml") == config_in(tmp_path, *moved)
    with pytest.raises(UserError, match=r"judge\.model=other \(was m\)$"):
        prepare(config_in(tmp_path, *moved, "judge.model=other"), resume=True)


@pytest.mark.parametrize(
    "text",
    [
        "title: my site\n",
        "model: x\ndata: y\nseed: 1\noutput_dir: z\n",  # some keys of ours
        "",
        "- a\n",
        "title: [",
        to_yaml(Config())[:100],  # cut off
    ],
)
@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (False, True), (True, False)])
def test_a_configuration_that_is_no_runs_is_left_alone(
    text: str, resume: bool, overwrite: bool, tmp_path: Path
) -> None:
    write(tmp_path, "src/main.py", ".git/HEAD", "images/logo.png", "policy/terms.md")
    (tmp_path / "config.yaml").write_text(text)
    there = files(tmp_path)
    for refuse in (check_folder, prepare):
        with pytest.raises(UserError, match=r"holds a config\.yaml that is no run's, or not whole"):
            refuse(config_in(tmp_path), resume=resume, overwrite=overwrite)
    assert files(tmp_path) - {".lock"} == there
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_run_of_a_version_with_other_fields_can_be_replaced(tmp_path: Path) -> None:
    old = to_yaml(config_in(tmp_path)).replace("group_size:", "completions:").replace("advantage:", "credit:")
    (tmp_path / "config.yaml").write_text(old)
    assert holds_run(tmp_path)
    prepare(config_in(tmp_path), overwrite=True)
    assert load_config(tmp_path / "config.yaml") == config_in(tmp_path)


def test_a_run_that_is_replaced_leaves_its_verdicts_and_what_others_wrote(tmp_path: Path) -> None:
    kept = {"judge/verdicts.sqlite", "src/main.py", ".git/HEAD", "notes.txt", "metrics.csv", "config.yaml"}
    write(tmp_path, *kept, "checkpoints/step-000001/state", "policy/config.json", "nonfinite-step12-rank3.pt")
    write(tmp_path, "metrics.jsonl", "tensorboard/events", "images/a.png", "evaluation-before.json", "summary.md")
    remove_run(tmp_path)
    assert files(tmp_path) == kept


def test_links_to_another_disk_are_removed_and_not_followed(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    write(disk, "checkpoints/step-000001/state", "policy")
    run.mkdir()
    for name in ("checkpoints", "policy"):
        (run / name).symlink_to(disk / name)
    (run / "images").symlink_to(disk / "gone")
    remove_run(run)
    assert not list(run.iterdir())
    assert files(disk) == {"checkpoints/step-000001/state", "policy"}


def test_a_removal_that_is_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config_in(tmp_path))
    write(tmp_path, "metrics.jsonl", "summary.md", "policy/config.json")

    with monkeypatch.context() as context:
        context.setattr("shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(config_in(tmp_path, "seed=1"), overwrite=True)
    prepare(config_in(tmp_path, "seed=1"), overwrite=True)
    assert files(tmp_path) == {"config.yaml", ".lock"}
    assert load_config(tmp_path / "config.yaml").seed == 1


def test_a_start_that_is_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr("os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            prepare(config_in(tmp_path))
    assert files(tmp_path) == {".config.yaml.partial", ".lock"}
    prepare(config_in(tmp_path))
    assert files(tmp_path) == {"config.yaml", ".lock"}


def test_the_configuration_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(config_in(tmp_path))
    path = tmp_path / "config.yaml"
    inode, text = path.stat().st_ino, path.read_text()
    prepare(config_in(tmp_path), resume=True)
    assert path.stat().st_ino == inode  # equal, and not written again

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    longer = config_in(tmp_path, "optim.steps=90")
    with monkeypatch.context() as context:
        context.setattr("os.fsync", fail)
        with pytest.raises(UserError, match=f"{re.escape(str(tmp_path))}: No space left"):
            prepare(longer, resume=True)
    assert path.read_text() == text
    prepare(longer, resume=True)
    assert load_config(path) == longer


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    config = config_in(tmp_path / "run")
    with ExitStack() as stack:
        stack.enter_context(prepared_folder(config, ALONE, resume=False, overwrite=False))
        write(tmp_path / "run", "metrics.jsonl")
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with pytest.raises(UserError, match=r"run: another run is using this folder"):
                prepare(config, resume=resume, overwrite=overwrite)
    assert "metrics.jsonl" in files(tmp_path / "run")
    # The first one is over: what it left is there to see now, if it was not before.
    with pytest.raises(UserError, match="already holds a run"):
        prepare(config)
    prepare(config, resume=True)


def test_hosts_that_do_not_share_the_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three processes two see the same disk; each tells what it met."""
    names = threading.local()
    monkeypatch.setattr("platform.node", lambda: names.host)
    meeting = Meeting(3)

    def begin(rank: int, disk: str) -> str:
        names.host = f"host-of-{disk}"
        (tmp_path / disk).mkdir(exist_ok=True)
        config = config_in(tmp_path / disk / "run")
        runtime: Any = ThreadRuntime(rank, meeting, torch.device("cpu"))
        try:
            with prepared_folder(config, runtime, resume=False, overwrite=False, patience=0.2):
                return "it goes on"
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(3) as threads:
        told = list(threads.map(begin, range(3), ["shared", "shared", "local"]))
        assert all("run is another folder on host-of-local; name one on a file" in text for text in told)
        (tmp_path / "new").mkdir()
        assert list(threads.map(begin, range(3), ["new"] * 3)) == ["it goes on"] * 3


def test_a_configuration_that_a_network_shows_late_is_waited_for(tmp_path: Path) -> None:
    timer = threading.Timer(0.2, prepare, [config_in(tmp_path)])
    timer.start()
    second = Alone(1, 2, torch.device("cpu"))
    with prepared_folder(config_in(tmp_path), second, resume=False, overwrite=False, patience=30):
        assert (tmp_path / "config.yaml").is_file()
    timer.join()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(UserError, match=rf"output_dir={place}: .*; name a folder"):
            prepare(config_in(place))
