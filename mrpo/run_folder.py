"""The folder of a run: whose it is, that one run at a time writes to it, and how another run takes its place."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mrpo import yaml12
from mrpo.config import JUDGE_TRANSPORT, Config
from mrpo.errors import UserError
from mrpo.file_lock import lock_file
from mrpo.settings import load_config, to_yaml
from mrpo.whole_files import partial_path, remove_path, write_whole

if TYPE_CHECKING:
    from mrpo.runtime import Runtime

CONFIG = "config.yaml"
VERDICTS = "judge"  # folder
LOCK = ".lock"  # it stays when the run is over: whoever removed it could remove the one of a run that begins
# Seconds for the processes of a run that was just killed to die.
PATIENCE = 10.0
# All else that a run writes to its folder, and what a kill may leave of it half written.
_WRITTEN = (
    "metrics.jsonl", ".metrics.jsonl.tmp", "samples.jsonl", ".samples.jsonl.tmp", "images",
    "tensorboard", "wandb", "wandb_id.txt", "checkpoints", "policy", ".policy.partial", "nonfinite-step*-rank*.pt",
    "evaluation-before.json", "evaluation-after.json", ".evaluation-*.json.partial",
    "summary.md", "summary.json", "curves.png", "failures.png", "timeline.png",
)  # fmt: skip
# Every version writes these keys of a configuration, and what else has a config.yaml lacks some of them.
_MARKS = {"algorithm", "output_dir", "model", "data", "rollout", "reward", "judge", "optim"}
# Fields that may change when a run is continued: they do not touch what it computes. A judge of one's own may have
# moved, as servers do from job to job; verdicts are kept under their endpoint, so one at another URL is asked anew.
_MAY_CHANGE = (
    "output_dir", "checkpoint", "log", "eval", "update", "optim.steps", "optim.epochs", "optim.micro_batch_size",
    *(f"judge.{name}" for name in ("base_url", *sorted(JUDGE_TRANSPORT))),
    *(f"rollout.{name}" for name in ("servers", "server_timeout", "sync_group", "sync_folder")),
    "rollout.batch_size", "rollout.gpu_memory", "rollout.sleep_level",
)  # fmt: skip


def holds_run(folder: Path) -> bool:
    """Whether a run is in `folder`; if not, one may begin there.

    Raises:
        UserError: something else is there: a config.yaml that is no run's, or other files without one.
    """
    stored = folder / CONFIG
    if stored.is_file():
        if not _is_of_a_run(stored):
            raise UserError(f"output_dir={folder} holds a {CONFIG} that is no run's, or not whole; name another folder")
        return True
    # A run that was killed at once leaves these.
    begun = (LOCK, partial_path(stored).name)
    if folder.is_dir() and any(path.name not in begun for path in folder.iterdir()):
        raise UserError(f"output_dir={folder} is not empty and holds no run; name another folder")
    return False


def check_folder(config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuses to mix runs: an existing one is continued with `resume` or replaced with `overwrite`.

    Raises:
        UserError: there is no run to resume, or one with another configuration; a run without either; something else.
    """
    folder = config.output_dir
    stored = folder / CONFIG
    if resume and not stored.is_file():
        raise UserError(f"output_dir={folder} holds no run to resume ({stored} is missing)")
    if not holds_run(folder):
        return
    if resume:
        _check_same(config, load_config(stored), stored)
    elif not overwrite:
        raise UserError(
            f"output_dir={folder} already holds a run; add --resume to continue it, --overwrite to replace it, or name "
            "another output_dir"
        )


@contextmanager
def prepared_folder(
    config: Config, runtime: Runtime, *, resume: bool, overwrite: bool, patience: float = PATIENCE
) -> Iterator[None]:
    """`output_dir` with the run's configuration, and with no other run in it until the block ends.

    Every process must call this. The main one holds the folder's lock, removes the run that is overwritten, and writes
    the configuration; the others see it within `patience` seconds, or they are on a host that does not share the
    folder, where their part of a checkpoint would be lost.

    Raises:
        UserError: see `check_folder`; another run has used the folder for `patience` seconds; it cannot be written;
            hosts do not share it.
    """
    if not runtime.is_main:
        runtime.barrier()
        _check_shared(config.output_dir, runtime, patience)
        yield
        return
    folder = config.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("ab")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with lock:
        if not lock_file(lock, patience):
            raise UserError(f"output_dir={folder}: another run is using this folder; let it end, or name another one")
        check_folder(config, resume=resume, overwrite=overwrite)  # again: another run may have been here
        try:
            if overwrite:
                remove_run(folder)
            _write_config(config)
        except OSError as error:
            raise _unwritable(folder, error) from None
        runtime.barrier()
        _check_shared(folder, runtime, patience)
        yield


def remove_run(folder: Path) -> None:
    """Deletes what a run wrote to `folder`, and nothing else that is there.

    Its configuration stays until the next run's takes its place, so that a removal that is killed can be repeated; the
    judge's verdicts stay, as they were paid for and hold for any run. Of a link, as to checkpoints on another disk, the
    link is removed, and not what it leads to.
    """
    for path in list(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in _WRITTEN):
            remove_path(path)


def _check_shared(folder: Path, runtime: Runtime, patience: float) -> None:
    """Refuses hosts that do not see what the main process has written. Every process must call this.

    Raises:
        UserError: names them.
    """
    missing = None if _appears(folder, CONFIG, patience) else platform.node()
    hosts = sorted({host for host in runtime.gather_objects(missing) if host is not None})
    if hosts:
        raise UserError(
            f"output_dir={folder} is another folder on {', '.join(hosts)}; name one on a file system that all hosts of "
            "the run share"
        )


def _appears(folder: Path, name: str, patience: float) -> bool:
    """Whether a file is in `folder` within `patience` seconds: network file systems show it late to other hosts.

    The folder is listed, as they may remember of a name that was looked up before that it is not there.
    """
    deadline = time.monotonic() + patience
    while True:
        with suppress(OSError):
            if name in os.listdir(folder):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _is_of_a_run(path: Path) -> bool:
    """Whether a run wrote this configuration, of this version of the program or of one with other fields."""
    try:
        tree = yaml12.load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and tree.keys() >= _MARKS


def _write_config(config: Config) -> None:
    path, text = config.output_dir / CONFIG, to_yaml(config)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, [text])


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"output_dir={folder}: {error.strerror}; name a folder that can be written")


def _check_same(config: Config, stored: Config, path: Path) -> None:
    now, then = _flat(config.model_dump(mode="json")), _flat(stored.model_dump(mode="json"))
    differing = [
        f"{key}={now.get(key)} (was {then.get(key)})"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if differing:
        raise UserError(f"--resume with another configuration than {path}: {', '.join(differing)}")


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
