"""Which implementation of an operator runs where: one table, which `use` overrides.

A pair of device and dtype that the table does not list runs the plain PyTorch definition of `reference.py`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch

# `cpp` computes in fp32: half precision is converted on the way in, fp64 keeps its precision in the reference.
IMPLEMENTATIONS: dict[str, dict[tuple[str, torch.dtype], str]] = {
    "policy_loss": {
        ("cpu", torch.float32): "cpp",
        ("cpu", torch.bfloat16): "cpp",
        ("cpu", torch.float16): "cpp",
    },
}

_forced: ContextVar[str | None] = ContextVar("forced_implementation", default=None)


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every operator of this context by `implementation` ("cpp", "reference"); what it cannot do raises."""
    token = _forced.set(implementation)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation_of(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the implementation to run.

    Raises:
        RuntimeError: `use` forces one that does not serve this device and dtype, or is not built.
    """
    listed = IMPLEMENTATIONS[operator].get((device.type, dtype), "reference")
    forced = _forced.get()
    if forced is None:
        if listed != "cpp" or extension() is not None:
            return listed
        _warn_not_built()
        return "reference"
    if forced not in ("reference", listed):
        raise RuntimeError(f"{operator}: implementation {forced!r} does not serve {dtype} on {device.type}")
    if forced == "cpp" and extension() is None:
        raise RuntimeError(f"{operator}: implementation 'cpp' needs the extension mrpo._C, which is not built")
    return forced


@lru_cache(maxsize=1)
def extension() -> ModuleType | None:
    """The compiled module mrpo._C, or None where it is not built."""
    try:
        return importlib.import_module("mrpo._C")
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _warn_not_built() -> None:
    warnings.warn(
        "mrpo._C is not built: the policy loss runs in plain PyTorch, which is slower and takes more memory. "
        "Reinstall mrpo with a C++17 compiler to build it.",
        RuntimeWarning,
        stacklevel=4,
    )
