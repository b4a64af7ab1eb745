"""What the kernels' tests share."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from emulated_rows import compiled


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def kernels(pytestconfig: pytest.Config) -> ModuleType:
    """The emulated kernels as a module."""
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    folder = pytestconfig.cache.mkdir("cuda_emulation")
    options = ("-O1", "-fPIC", "-shared", "-fvisibility=hidden", *includes)
    path = compiled(folder, "emulated_kernels.cpp", "emulated_kernels.so", *options)
    spec = importlib.util.spec_from_file_location("emulated_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
