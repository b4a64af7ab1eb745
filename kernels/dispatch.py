"""Which implementation of an operator runs where: one table, which `use` overrides.

The table gives the implementations of a device and dtype in order of preference. A pair that it does not list, or none
of whose implementations runs in this installation on this device, runs the plain PyTorch definition of `reference.py`
and says so once.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import lru_cache, wraps
from importlib.util import find_spec
from types import FrameType, ModuleType
from typing import Any, TypeVar, cast

import torch

_Backward = TypeVar("_Backward", bound=Callable[..., Any])

_HALF_AND_FP32 = (torch.float32, torch.bfloat16, torch.float16)

# All but `reference` compute in fp32, whatever the dtype of the logits; fp64 keeps its precision in the reference.
# `cuda` is the default on Hopper and newer, where it reads a row from memory once; elsewhere it must be forced.
# The linear operators are made of the row kernel of the policy loss and follow its entry.
IMPLEMENTATIONS: dict[str, dict[tuple[str, torch.dtype], tuple[str, ...]]] = {
    "policy_loss": {
        **{("cpu", dtype): ("cpp",) for dtype in _HALF_AND_FP32},
        **{("cuda", dtype): ("cuda", "triton") for dtype in _HALF_AND_FP32},
        ("cpu", torch.float64): ("reference",),
        ("cuda", torch.float64): ("reference",),
    },
    "step_advantages": {
        **{("cpu", dtype): ("reference",) for dtype in (*_HALF_AND_FP32, torch.float64)},
        **{("cuda", dtype): ("triton",) for dtype in (*_HALF_AND_FP32, torch.float64)},
    },
}

# From this compute capability on `cuda` is preferred: thread-block clusters.
_CLUSTERS = (9, 0)

_forced: ContextVar[str | None] = ContextVar("forced_implementation", default=None)
_fallback_forbidden: ContextVar[bool] = ContextVar("fallback_forbidden", default=False)


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every operator of this context by `implementation` ("cuda", "triton", "cpp", "reference").

    What it cannot do raises RuntimeError; an operator that has no such implementation anywhere runs as usual. Triton
    runs on the CPU under its interpreter only: with TRITON_INTERPRET=1 in the environment before triton is imported.
    """
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def forbid_fallback() -> Iterator[None]:
    """Within this context RuntimeError is raised where otherwise the reference would run with a warning."""
    token = _fallback_forbidden.set(True)
    try:
        yield
    finally:
        _fallback_forbidden.reset(token)


def remember_context(ctx: Any) -> None:
    """Keeps what `use` and `forbid_fallback` say now, in a forward pass, for the backward pass."""
    ctx.caller = copy_context()


def in_context_of_forward(backward: _Backward) -> _Backward:
    """A backward pass for which `use` and `forbid_fallback` hold that were in force when `remember_context` was called.

    The backward pass of GPUs runs in threads of autograd's own, where nothing of the caller's holds.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return ctx.caller.copy().run(backward, ctx, *gradients)

    return cast(_Backward, run)


def implementation_of(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation to run.

    Raises:
        RuntimeError: `use` forces one that does not serve this device and dtype, or is not installed, or that nobody
            knows; or `forbid_fallback` forbids the reference.
    """
    forced = _forced_for(operator, device, dtype)
    choices = (forced,) if forced else IMPLEMENTATIONS[operator].get((device.type, dtype), ())
    missing = f"no kernel serves {dtype} on {device.type}"
    for choice in choices:
        found = _missing(choice, device)
        if found is None and (forced or choice != "cuda" or _capability(device) >= _CLUSTERS):
            return choice
        missing = found or missing
    if forced is not None or _fallback_forbidden.get():
        raise RuntimeError(f"{operator}: {missing}")
    _warn(f"{missing}: {operator} runs in plain PyTorch, which is slower and takes more memory")
    return "reference"


def _forced_for(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What `use` forces on this operator, if anything."""
    forced, table = _forced.get(), IMPLEMENTATIONS[operator]
    if forced is None or forced == "reference":
        return forced
    if not any(forced in names for other in IMPLEMENTATIONS.values() for names in other.values()):
        raise RuntimeError(f"there is no implementation {forced!r} of any operator")
    if not any(forced in names for names in table.values()):
        return None
    interpreted = forced == "triton" and device.type == "cpu" and triton_is_interpreted()
    if forced not in table.get(("cuda" if interpreted else device.type, dtype), ()):
        raise RuntimeError(f"{operator}: implementation {forced!r} does not serve {dtype} on {device.type}")
    return forced


@lru_cache(maxsize=1)
def extension() -> ModuleType | None:
    """The compiled module mrpo._C, or None where it is not built."""
    try:
        return importlib.import_module("mrpo._C")
    except ImportError:
        return None


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return find_spec(package) is not None


def triton_is_interpreted() -> bool:
    """Whether Triton runs kernels in Python on the CPU."""
    if not is_installed("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _missing(implementation: str, device: torch.device) -> str | None:
    """What this installation or machine lacks to run it, and the cure."""
    module = extension()
    if implementation in ("cpp", "cuda") and module is None:
        return "mrpo._C is not built (reinstall mrpo with a C++17 compiler)"
    if implementation == "cuda" and not getattr(module, "cuda_architectures", ()):
        return "mrpo._C has no CUDA part (reinstall mrpo where nvcc is)"
    if implementation == "cuda" and not torch.cuda.is_available():
        return f"there is no CUDA driver or device to run on {device}"
    if implementation == "triton" and not is_installed("triton"):
        return "triton is not installed (pip install triton)"
    return None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _warn(message: str) -> None:
    """Once for each message; the warning points at the caller of this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
