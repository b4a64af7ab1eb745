"""What setup.py decides about the CUDA part, with a compiler that only writes down what it was asked."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution
from setuptools.errors import CCompilerError

pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in the repository's root, with nothing asked for in the environment."""
    monkeypatch.chdir(ROOT)
    for name in ("MRPO_CUDA", "MRPO_CUDA_TARGETS", "MRPO_CPP", "NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("mrpo_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler(folder: Path, knows: str = "sm_75 sm_80 sm_90 sm_100 sm_120", fails: bool = False) -> Path:
    """An nvcc that knows these generations and writes every call into `calls` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "lib64").mkdir(exist_ok=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
echo "$@" >> "{folder}/calls"
case "$1" in
  --list-gpu-code) echo {knows.replace(" ", "; echo ")} ;;
  --dryrun) echo "#$ TOP={folder.parent}" ;;
  *) {"echo unsupported host compiler; exit 1" if fails else "exit 0"} ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return nvcc


def built_with(build: ModuleType, nvcc: Path, temporary: Path) -> tuple[str, str]:
    """What the CUDA part was compiled for, and the compiling call."""
    command = build.BuildExtension(Distribution())
    command.build_temp = str(temporary)
    architectures = command.build_cuda(build.CPU_EXTENSION, str(nvcc))
    (call,) = [line for line in (nvcc.parent / "calls").read_text().splitlines() if line.startswith("-c ")]
    return architectures, call


@pytest.mark.parametrize(
    ("knows", "targets", "portable"),
    [
        ("sm_75 sm_80 sm_90 sm_100 sm_120", ["80", "90a", "100"], "100"),
        ("sm_80 sm_90", ["80", "90a"], "90"),
    ],
)
def test_the_cuda_part_is_compiled_for_what_nvcc_knows(
    build: ModuleType, tmp_path: Path, knows: str, targets: list[str], portable: str
) -> None:
    architectures, call = built_with(build, compiler(tmp_path / "bin", knows), tmp_path / "temporary")
    assert architectures.split() == [f"sm_{target}" for target in targets]
    codes = [f"arch=compute_{target},code=sm_{target}" for target in targets]
    assert re.findall(r"-gencode=(\S+)", call) == [*codes, f"arch=compute_{portable},code=compute_{portable}"]
    extension = build.CPU_EXTENSION
    assert "cudart_static" in extension.libraries
    assert str(tmp_path / "lib64") in extension.library_dirs
    assert ("MRPO_CUDA", "1") in extension.define_macros


def test_fewer_targets_may_be_named(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRPO_CUDA_TARGETS", "90a 80")
    architectures, call = built_with(build, compiler(tmp_path / "bin"), tmp_path / "temporary")
    assert architectures == "sm_80 sm_90a"
    codes = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]
    assert re.findall(r"-gencode=(\S+)", call) == codes


@pytest.mark.parametrize("reason", ["fails", "knows too little"])
def test_where_nvcc_cannot_the_way_out_is_named(build: ModuleType, tmp_path: Path, reason: str) -> None:
    nvcc = compiler(tmp_path / "bin", "sm_75" if reason == "knows too little" else "sm_80", fails=reason == "fails")
    with pytest.raises(CCompilerError, match=r"MRPO_CUDA=0 pip install") as caught:
        built_with(build, nvcc, tmp_path / "temporary")
    assert ("unsupported host compiler" in str(caught.value)) == (reason == "fails")


def test_the_compiler_is_found(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path, at_home, named = (compiler(tmp_path / name / "bin") for name in ("path", "home", "named"))
    monkeypatch.setenv("PATH", "")
    assert build.find_nvcc() is None
    monkeypatch.setenv("PATH", str(on_path.parent), prepend=":")
    assert build.find_nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_HOME", str(at_home.parents[1]))
    assert build.find_nvcc() == str(at_home)
    monkeypatch.setenv("NVCC", str(named))
    assert build.find_nvcc() == str(named)
    monkeypatch.setenv("MRPO_CUDA", "0")
    assert build.find_nvcc() is None


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("MRPO_CUDA", "1", FileNotFoundError),
        ("NVCC", "/nowhere/nvcc", FileNotFoundError),
        ("MRPO_CUDA", "2", ValueError),
    ],
)
def test_a_demand_that_cannot_be_met_is_named(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[Exception]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=variable):
        build.find_nvcc()


def test_a_target_that_the_compiler_does_not_know_is_named(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MRPO_CUDA_TARGETS", "80 100")
    with pytest.raises(ValueError, match="MRPO_CUDA_TARGETS may name 80, 90a, with spaces between, not '100'"):
        built_with(build, compiler(tmp_path / "bin", "sm_80 sm_90"), tmp_path / "temporary")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_on_hopper_no_register_spills(build: ModuleType, tmp_path: Path) -> None:
    options = ["-O3", "-std=c++17", "-Xptxas", "-v", "-gencode=arch=compute_90a,code=sm_90a"]
    command = ["nvcc", "-cubin", build.CUDA_SOURCE, "-o", str(tmp_path / "kernels.cubin"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert set(spills) == {("0", "0")}
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == len(spills) == 12  # two kernels, three dtypes, with and without the entropy
    assert max(registers) <= 128  # 512 threads, more than the largest block, then fit a multiprocessor
