"""What is installed: packages in the ranges that mrpo asks for, the compiled extension, compilers, optional kernels."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch.utils.cpp_extension import get_default_build_root

from mrpo.config import Config
from mrpo.doctor.check import Check, State, first_line
from mrpo.doctor.machine import NVIDIA_DRIVER, Machine

# Where `pip install -e .` belongs: the folder of the source tree, when mrpo runs from one.
_SOURCE = Path(__file__).parents[2]
_REBUILD = (
    f"pip install -e {_SOURCE}" if (_SOURCE / "setup.py").is_file() else "pip install --force-reinstall --no-deps mrpo"
)
_APT_COMPILER = "apt install g++"


def requirements() -> dict[str, Requirement]:
    """What mrpo's own package metadata asks for on this machine, without extras.

    Raises:
        PackageNotFoundError: mrpo is imported from a folder and not installed.
    """
    found = [Requirement(text) for text in metadata.requires("mrpo") or []]
    return {item.name: item for item in found if item.marker is None or item.marker.evaluate({"extra": ""})}


def package_problem(requirement: Requirement) -> str | None:
    """What is wrong with an installed package, None when its version is in range."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is not {_range(requirement)}"
    return None


def check_package(name: str, fact: str = "") -> Check:
    """One package that mrpo needs, by its version; `fact` is added to it."""
    requirement = requirements()[name]
    problem = package_problem(requirement)
    if problem:
        installed = "not installed" not in problem
        return Check(name, "warning" if installed else "missing", problem, _pip([requirement]))
    return Check(name, "ok", f"{metadata.version(name)} ({_range(requirement)})" + (f", {fact}" if fact else ""))


def check_other_packages(named: tuple[str, ...]) -> Check:
    """All packages that mrpo needs besides those `named` on lines of their own."""
    others = [item for name, item in requirements().items() if name not in named]
    problems = {item.name: text for item in others if (text := package_problem(item))}
    if not problems:
        return Check("other packages", "ok", f"{len(others)}, all in the ranges that mrpo asks for")
    absent = any("not installed" in text for text in problems.values())
    remedy = _pip([item for item in others if item.name in problems])
    return Check("other packages", "missing" if absent else "warning", "; ".join(problems.values()), remedy)


def _pip(items: list[Requirement]) -> str:
    return "pip install " + " ".join(f"'{item.name}{_range(item)}'" for item in items)


def _range(requirement: Requirement) -> str:
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def check_torch(machine: Machine) -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    check = check_package("torch", build)
    if check.state != "ok" or machine.gpus or not NVIDIA_DRIVER.exists():
        return check
    if torch.version.cuda:
        return Check("torch", "warning", f"{check.fact}, finds no GPU although a driver is loaded", "nvidia-smi")
    remedy = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    return Check("torch", "warning", f"{check.fact}, although the machine has an NVIDIA driver", remedy)


def check_extension() -> Check:
    """The compiled module mrpo._C: there, loadable, and with operators for CUDA or not."""
    try:
        extension = importlib.import_module("mrpo._C")
    except ImportError as error:
        built = list((_SOURCE / "mrpo").glob("_C.*"))
        fact = f"{built[0].name} does not load: {first_line(error)}" if built else "not built"
        return Check("mrpo._C", "warning", f"{fact}; the policy loss runs in plain PyTorch", _REBUILD)
    cuda = bool(getattr(extension, "cuda_architectures", ()))
    return Check("mrpo._C", "ok", f"built and loaded, {'with' if cuda else 'without'} a CUDA part")


def check_compiler(*, needed: bool) -> Check:
    """A C++ compiler, needed to build mrpo._C and, on a CPU, DeepSpeed's communication op."""
    found = next((path for name in _compilers() if (path := shutil.which(name))), None)
    if found:
        return Check("C++ compiler", "ok", f"{_version_line(found)} at {found}")
    state: State = "warning" if needed else "optional"
    return Check("C++ compiler", state, "none of " + ", ".join(_compilers()), _APT_COMPILER)


def _compilers() -> list[str]:
    return [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]


def check_nvcc() -> Check:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if found is None:
        return Check("nvcc", "optional", "not found; only building CUDA code needs it")
    text = _output([found, "--version"])
    match = re.search(r"release (\d+)\.(\d+)", text)
    version = f"{match[1]}.{match[2]}" if match else "of unknown version"
    if torch.version.cuda and match and match[1] != torch.version.cuda.partition(".")[0]:
        fact = f"{version} at {found}, but torch was built with CUDA {torch.version.cuda}: what it builds will not load"
        return Check("nvcc", "warning", fact, f"export CUDA_HOME=FOLDER_OF_CUDA_{torch.version.cuda}")
    return Check("nvcc", "ok", f"{version} at {found}")


def check_triton(machine: Machine) -> Check:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        state: State = "warning" if machine.gpus else "optional"
        return Check("triton", state, f"cannot be imported: {first_line(error)}", "pip install triton")
    if not machine.gpus:
        return Check("triton", "optional", f"{triton.__version__}, and no GPU to run its kernels")
    target = triton.runtime.driver.active.get_current_target()
    return Check("triton", "ok", f"{triton.__version__}, compiles for {target.backend} {target.arch}")


def check_flash_attention(config: Config) -> Check:
    needed = config.model.attention == "flash_attention_2"
    check = check_optional("flash-attn", "flash_attn", "flash-attn", needed=needed)
    if check.state != "ok":
        return check
    try:
        importlib.import_module("flash_attn")  # its compiled part often belongs to another torch
    except ImportError as error:
        remedy = "pip install --force-reinstall --no-build-isolation flash-attn"
        state: State = "missing" if needed else "warning"
        return Check("flash-attn", state, f"{check.fact}, cannot be imported: {first_line(error)}", remedy)
    return check


def check_optional(name: str, module: str, extra: str, *, needed: bool = False) -> Check:
    """A package of one of mrpo's extras, which only some configurations use."""
    if importlib.util.find_spec(module) is None:
        state: State = "missing" if needed else "optional"
        return Check(name, state, "not installed", f"pip install 'mrpo[{extra}]'" if needed else None)
    # vLLM's build for CPUs comes under another name.
    distribution = metadata.packages_distributions().get(module, [module])[0]
    return Check(name, "ok", metadata.version(distribution))


def check_deepspeed(machine: Machine) -> Check:
    """DeepSpeed, and without a GPU its communication op, which the first start compiles with ninja."""
    importlib.import_module("deepspeed")
    check = check_package("deepspeed")
    if check.state != "ok" or machine.gpus:
        return check
    if shutil.which("ninja") is None:
        fact = f"{check.fact}; without ninja its communication op for CPUs cannot be loaded"
        return Check("deepspeed", "missing", fact, "pip install ninja")
    if communication_op() is not None:
        return Check("deepspeed", "ok", f"{check.fact}, communication op for CPUs compiled")
    if not any(map(shutil.which, _compilers())):
        fact = f"{check.fact}; its communication op for CPUs is not compiled and there is no C++ compiler"
        return Check("deepspeed", "missing", fact, _APT_COMPILER)
    return Check("deepspeed", "ok", f"{check.fact}, compiles its communication op for CPUs at the first start")


def communication_op() -> Path | None:
    """The shared library of DeepSpeed's communication op for CPUs in PyTorch's cache of extensions, if compiled."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    cache = Path(get_default_build_root())
    folders = [Path(root)] if root else sorted(cache.glob(f"{version}*"))
    return next((file for folder in folders for file in folder.glob("deepspeed_shm_comm/*.so")), None)


def _version_line(program: str) -> str:
    return next(iter(_output([program, "--version"]).splitlines()), "unknown version")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
