"""Makes the policy that ships with the package: a tiny Qwen3-VL, taught by our own SFT to read phantom scans badly.

First it learns from true rationales, because perception cannot be learned from corrupted ones; then, briefly, from
rationales of a reader who misreads the scene, whose error runs through the reasoning into the answer.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from mrpo.backbones import model_folder
from mrpo.backbones.tiny import build_tiny
from mrpo.errors import UserError

CLEAN_STEPS = 700
CORRUPTED_STEPS = 200
CORRUPTION = 0.65
_COMMON = (
    "algorithm=sft",
    "data.name=phantom",
    "data.train_size=60000",
    "prompt.instruction=",
    "optim.batch_size=64",
    "optim.micro_batch_size=64",
    "optim.schedule=cosine",
    "optim.beta2=0.95",
    "optim.weight_decay=0.01",
    "loss.normalization=token",
    "eval.at_start=false",
    "log.tensorboard=false",
    "log.plots=false",
)


def make_warm_start(out: Path | None, train_command: Sequence[str]) -> Path:
    """Trains the warm start and writes it in bfloat16 (2.5 MB) to `out`, by default over the shipped one.

    `train_command` is what `mrpo train` runs. About 12 minutes on one core.

    Raises:
        UserError: `out` cannot be written, which is tried first, or a training run failed.
    """
    target = Path(model_folder("phantom")) if out is None else out
    _check_writable(target)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_tiny(folder / "random", seed=0)
        clean = [f"optim.steps={CLEAN_STEPS}", "optim.lr=1e-3", "optim.warmup_steps=30"]
        _train(train_command, folder / "random", folder / "clean", [*clean, "seed=0"])
        corrupted = [
            f"optim.steps={CORRUPTED_STEPS}",
            "optim.lr=5e-4",
            "optim.warmup_steps=10",
            f"data.corruption={CORRUPTION}",
            "seed=1",
        ]
        _train(train_command, folder / "clean" / "policy", folder / "corrupted", corrupted)
        _write_bfloat16(folder / "corrupted" / "policy", target)
    return target


def _check_writable(folder: Path) -> None:
    """Makes `folder` and a file in it that goes again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder with --out") from None


def _train(command: Sequence[str], start: Path, out: Path, overrides: Sequence[str]) -> None:
    done = subprocess.run([*command, *_COMMON, f"model.path={start}", f"output_dir={out}", *overrides])
    if done.returncode != 0:
        raise UserError(f"the run that was to write {out} ended with status {done.returncode}")


def _write_bfloat16(source: Path, target: Path) -> None:
    """Half the size; the trainer reads it back into the dtype of `model.dtype`."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
