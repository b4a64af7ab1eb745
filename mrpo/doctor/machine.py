"""What the machine is: operating system, cores, memory, GPUs, and room on disk."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mrpo.config import Config
from mrpo.doctor.check import Check, gib
from mrpo.doctor.memory import ModelSize

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
OPTIMIZER_BYTES = 12  # a trained weight in a checkpoint, besides itself: float32 copy and two moments


@dataclass(frozen=True)
class Gpu:
    """A visible CUDA device; `free` and `total` are bytes, `capability` as in (9, 0)."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True)
class Machine:
    """What the checks compare with: visible GPUs, and main memory in bytes that processes may still take."""

    gpus: tuple[Gpu, ...]
    cores: int
    memory: int
    free_memory: int

    @classmethod
    def read(cls) -> Machine:
        """This machine, now."""
        total, free = read_memory()
        return cls(read_gpus(), len(os.sched_getaffinity(0)), total, free)


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs that PyTorch can use."""
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), free, total))
    return tuple(gpus)


def read_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Main memory in bytes, all of it and what is available, within a container's limit (cgroup v2) if there is one."""
    sizes = {}
    for line in proc.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit, used = (_read_integer(cgroup / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (used or 0))
    return total, free


def _read_integer(path: Path) -> int | None:
    """The number in a file; None where there is no file or it says `max`."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def check_python() -> Check:
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.platform()
    return Check("Python", "ok", f"{platform.python_version()} at {sys.executable}; {system}, {platform.machine()}")


def check_processor(machine: Machine) -> Check:
    return Check(
        "CPU and memory", "ok", f"{machine.cores} cores, {gib(machine.free_memory)} of {gib(machine.memory)} free"
    )


def check_gpus(machine: Machine, config: Config, num_processes: int) -> Check:
    """Whether each process has a GPU of its own, or none has one and the CPU does the work."""
    if not machine.gpus:
        if config.model.path == "phantom":
            return Check("GPU", "optional", "none; the tiny policy trains on the CPU")
        return Check("GPU", "warning", "none that PyTorch can use; training would run on the CPU")
    listed = "; ".join(
        f"{index}: {gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
        f"{gib(gpu.free)} of {gib(gpu.total)} free"
        for index, gpu in enumerate(machine.gpus)
    )
    if num_processes > len(machine.gpus):
        fact = f"{len(machine.gpus)} for {num_processes} processes: {listed}"
        return Check("GPU", "missing", fact, f"mrpo train --num-gpus {len(machine.gpus)}")
    old = [gpu for gpu in machine.gpus if gpu.capability < (8, 0)]
    if old and config.model.dtype == "bfloat16":
        fact = f"{listed}; model.dtype=bfloat16 is slow below compute capability 8.0"
        return Check("GPU", "warning", fact, "model.dtype=float32")
    return Check("GPU", "ok", listed)


def check_disk(config: Config, model: ModelSize | None) -> Check:
    """Room in `output_dir` for the checkpoints that are kept, the one being written, and the exported policy."""
    folder = existing_parent(config.output_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        fact = f"output_dir={config.output_dir}: {folder} is not writable"
        return Check("disk", "missing", fact, "output_dir=FOLDER that is writable")
    free = shutil.disk_usage(folder).free
    fact = f"{gib(free)} free in output_dir={config.output_dir}"
    if model is None:
        return Check("disk", "ok", fact)
    weights = model.parameters * (4 if config.model.dtype == "float32" else 2)
    checkpoint = weights + OPTIMIZER_BYTES * model.trainable
    count, exported = kept_checkpoints(config), weights if config.checkpoint.export else 0
    need = count * checkpoint + exported
    details = (f"{count} checkpoints x {gib(checkpoint)} + exported policy {gib(exported)} = {gib(need)}",)
    if need > free:
        remedy = "output_dir=FOLDER on a larger disk, or checkpoint.keep_last=1 checkpoint.keep_best=0"
        return Check("disk", "missing", f"{fact}; the run writes up to {gib(need)}", remedy, details)
    return Check("disk", "ok", f"{fact}; the run writes up to {gib(need)}", None, details)


def kept_checkpoints(config: Config) -> int:
    """The most checkpoints that are on disk at once: those kept and one being written, or as many as a run makes."""
    if config.checkpoint.every == 0:
        return 1  # after the last step
    most = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    return most if config.optim.steps is None else min(most, math.ceil(config.optim.steps / config.checkpoint.every))


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path
