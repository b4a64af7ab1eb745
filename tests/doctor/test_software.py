"""Checks of what is installed: on this machine, and where something is taken away."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mrpo.doctor import software
from mrpo.doctor.machine import Gpu, Machine
from mrpo.settings import load_config

CPU = Machine((), 2, 2**34, 2**33)
GPU = Machine((Gpu("a GPU", (9, 0), 2**36, 2**37),), 2, 2**34, 2**33)


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def program(folder: Path, name: str, output: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)


def test_the_packages_of_this_installation_are_in_range() -> None:
    for name in ("torch", "transformers"):
        check = software.check_package(name)
        assert check.state == "ok", check
        assert metadata.version(name) in check.fact
    assert software.check_other_packages(("torch",)).state == "ok"
    assert set(software.requirements()) >= {"torch", "transformers", "deepspeed", "pydantic"}
    assert "vllm" not in software.requirements()


@pytest.mark.parametrize(
    ("text", "state", "fact", "remedy"),
    [
        ("transformers>=99,<100", "warning", "is not >=99,<100", "pip install 'transformers>=99,<100'"),
        ("surely-not-installed>=1", "missing", "surely-not-installed is not installed", "pip install 'surely-not-"),
    ],
)
def test_a_package_out_of_range(text: str, state: str, fact: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    item = Requirement(text)
    monkeypatch.setattr(software, "requirements", lambda: {item.name: item})
    for check in (software.check_package(item.name), software.check_other_packages(())):
        assert check.state == state
        assert fact in check.fact
        assert check.remedy is not None
        assert check.remedy.startswith(remedy)


def test_torch_says_how_it_was_built() -> None:
    assert (str(torch.version.cuda) if torch.version.cuda else "without CUDA") in software.check_torch(GPU).fact


def test_a_driver_that_torch_cannot_use_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(software, "NVIDIA_DRIVER", tmp_path)
    assert software.check_torch(CPU).state == "warning"
    monkeypatch.setattr(software, "NVIDIA_DRIVER", tmp_path / "nonexistent")
    assert software.check_torch(CPU).state == "ok"


def test_the_extension_of_this_installation() -> None:
    check = software.check_extension()
    assert (check.state, check.fact.startswith("built and loaded, with")) == ("ok", True)


def test_an_extension_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mrpo._C", None)
    monkeypatch.setattr(software, "_SOURCE", tmp_path)
    check = software.check_extension()
    assert (check.state, check.fact) == ("warning", "not built; the policy loss runs in plain PyTorch")
    assert check.remedy is not None
    (tmp_path / "mrpo").mkdir()
    (tmp_path / "mrpo" / "_C.cpython-311.so").touch()
    assert software.check_extension().fact.startswith("_C.cpython-311.so does not load")


def test_compilers(empty_path: Path) -> None:
    assert software.check_compiler(needed=True).state == "warning"
    assert software.check_compiler(needed=False).state == "optional"
    program(empty_path, "g++", "g++ 13.2")
    assert software.check_compiler(needed=True).fact == f"g++ 13.2 at {empty_path / 'g++'}"


def test_nvcc(empty_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.check_nvcc().state == "optional"
    program(empty_path, "nvcc", "Cuda compilation tools, release 12.8, V12.8.61")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert software.check_nvcc().fact == f"12.8 at {empty_path / 'nvcc'}"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert software.check_nvcc().state == "warning"


def test_triton_is_optional_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.check_triton(CPU).state == "optional"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert software.check_triton(CPU).state == "optional"
    assert software.check_triton(GPU).state == "warning"


def test_what_the_configuration_asks_for_must_be_installed() -> None:
    absent = "surely_not_installed"
    assert software.check_optional("X", absent, "x", needed=False).state == "optional"
    check = software.check_optional("X", absent, "x", needed=True)
    assert (check.state, check.remedy) == ("missing", "pip install 'mrpo[x]'")
    assert software.check_optional("pytest", "pytest", "test", needed=True).fact == metadata.version("pytest")


def test_flash_attention_is_missing_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert software.check_flash_attention(load_config()).state == "optional"
    asked = load_config(None, ["model.attention=flash_attention_2"])
    assert software.check_flash_attention(asked).state == "missing"


def test_deepspeed_needs_ninja_and_a_compiler_on_a_cpu(
    empty_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert software.check_deepspeed(GPU).state == "ok"
    check = software.check_deepspeed(CPU)
    assert (check.state, check.remedy) == ("missing", "pip install ninja")
    program(empty_path, "ninja", "1.11")
    check = software.check_deepspeed(CPU)
    assert (check.state, check.remedy) == ("missing", "apt install g++")
    program(empty_path, "g++", "g++ 13.2")
    assert "compiles its communication op" in software.check_deepspeed(CPU).fact
    (tmp_path / "extensions" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    assert "communication op for CPUs compiled" in software.check_deepspeed(CPU).fact
