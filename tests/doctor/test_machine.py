"""Checks of the machine: this one, and others described by hand."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from mrpo.doctor.machine import (
    Gpu,
    Machine,
    check_disk,
    check_gpus,
    check_processor,
    check_python,
    kept_checkpoints,
    read_gpus,
    read_memory,
)
from mrpo.doctor.memory import ModelSize, Tower
from mrpo.settings import load_config

GIB = 2**30
MODEL = ModelSize(10**6, 10**6, Tower(1, 1, 1), None, 1, 1)


def machine(*capabilities: tuple[int, int]) -> Machine:
    return Machine(tuple(Gpu("a GPU", c, 70 * GIB, 80 * GIB) for c in capabilities), 4, 8 * GIB, 6 * GIB)


def test_memory_of_this_machine() -> None:
    total, free = read_memory(cgroup=Path("/nonexistent"))
    assert total == psutil.virtual_memory().total
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal:       1000 kB\nMemFree:        100 kB\nMemAvailable:    700 kB\n")
    assert read_memory(proc, tmp_path) == (1_024_000, 716_800)
    (tmp_path / "memory.max").write_text("max\n")
    assert read_memory(proc, tmp_path) == (1_024_000, 716_800)
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("100000\n")
    assert read_memory(proc, tmp_path) == (500_000, 400_000)


def test_this_machine() -> None:
    here = Machine.read()
    assert here.cores == len(os.sched_getaffinity(0))
    assert f"{here.cores} cores" in check_processor(here).fact
    assert check_python().state == "ok"


@pytest.mark.gpu
def test_gpus_of_this_machine() -> None:
    gpus = read_gpus()
    assert len(gpus) == torch.cuda.device_count()
    assert 0 < gpus[0].free <= gpus[0].total
    assert gpus[0].capability >= (5, 0)


def test_gpus() -> None:
    tiny = load_config()
    large = load_config(None, ["model.path=/models/8b", "model.dtype=bfloat16"])
    assert check_gpus(machine(), tiny, 1).state == "optional"
    assert check_gpus(machine(), large, 1).state == "warning"
    assert check_gpus(machine((9, 0)), large, 1).state == "ok"
    assert "compute capability 9.0, 70.0 GiB of 80.0 GiB free" in check_gpus(machine((9, 0)), large, 1).fact
    assert check_gpus(machine((7, 5)), large, 1).state == "warning"
    too_few = check_gpus(machine((9, 0)), large, 2)
    assert (too_few.state, too_few.remedy) == ("missing", "mrpo train --num-gpus 1")


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ([], 4),  # two last, one best, one being written
        (["checkpoint.keep_last=1", "checkpoint.keep_best=0"], 2),
        (["checkpoint.every=0"], 1),
        (["optim.steps=45"], 3),  # after steps 20, 40 and the last one
        (["optim.steps=10"], 1),
        (["optim.steps=null"], 4),
    ],
)
def test_checkpoints_on_disk_at_once(settings: list[str], count: int) -> None:
    assert kept_checkpoints(load_config(None, settings)) == count


def test_disk(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path / 'not' / 'yet' / 'there'}"])
    check = check_disk(config, MODEL)
    assert check.state == "ok"
    # 4 checkpoints of 16 MB (float32 weights, their copy and two moments) and 4 MB of exported policy
    assert f"the run writes up to {(4 * 16 + 4) * 10**6 / 2**20:.0f} MiB" in check.fact
    huge = ModelSize(10**13, 10**13, Tower(1, 1, 1), None, 1, 1)
    assert check_disk(config, huge).state == "missing"


def test_a_folder_that_cannot_be_written_to() -> None:
    assert check_disk(load_config(None, ["output_dir=/proc/runs"]), MODEL).state == "missing"
