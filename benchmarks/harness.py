"""How every suite measures: agreement first, then interleaved timings, with the machine's ceilings of the same run."""

from __future__ import annotations

import csv
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "vllm", "trl", "liger-kernel", "cut-cross-entropy")


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: median, and the spread from the lowest to the highest run."""

    median: float
    low: float
    high: float


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(candidates: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times the candidates in turns, so that a drift of the machine's speed meets them all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            synchronize()
            began = time.perf_counter()
            run()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that `run` holds at its worst above what was there before: device memory, or resident memory on a CPU."""
    run()
    gc.collect()
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in fp64."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def machine() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "cpu": _cpu_name()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def ceilings(dtype: torch.dtype, *, size: int, copy_bytes: int) -> dict[str, float]:
    """FLOP/s of a square matrix product and bytes/s of a copy (read and write counted), measured here and now."""
    where = device()
    a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=where).fill_(1)
    target = torch.empty_like(source)
    timings = interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=10, warmup=3)
    return {"flops": 2 * size**3 / timings["product"].low, "copy": 2 * copy_bytes / timings["copy"].low}


def write_results(out: Path, name: str, results: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
    """Writes OUT/NAME.json with the machine, and OUT/NAME.csv; whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **notes, "results": list(results)}, indent=2)
    partial = out / f".{name}.json"
    partial.write_text(text + "\n")
    partial.rename(out / f"{name}.json")
    columns = list(dict.fromkeys(key for result in results for key in result))
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(results)
