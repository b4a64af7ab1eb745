"""What pyproject.toml cannot say: the extension mrpo._C, and that the folder kernels/ is the package mrpo.kernels.

The CPU part of mrpo._C is built everywhere, the CUDA part where nvcc is found: through $NVCC, $CUDA_HOME or PATH.
MRPO_CUDA=0 leaves it out, MRPO_CUDA=1 demands it, MRPO_CPP=0 leaves out the whole extension.
MRPO_CUDA_TARGETS names what the CUDA part is compiled for, such as 90a, instead of all in `CUDA_TARGETS`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CCompilerError

CUDA_SOURCE = "csrc/policy_loss_cuda.cu"
# What the CUDA part is compiled for, of what the compiler knows: its name for the generation, and the target. The last
# is kept as PTX too, which drivers compile for generations to come.
CUDA_TARGETS = {"sm_80": "80", "sm_90": "90a", "sm_100": "100"}

CPU_EXTENSION = Pybind11Extension(
    "mrpo._C",
    sources=["csrc/bindings.cpp", "csrc/policy_loss_cpu.cpp"],
    depends=sorted(str(path) for path in Path("csrc").iterdir()),
    cxx_std=17,
    # Without the second flag compilers keep branches in a loop for the sake of floating-point traps: no AVX2 vectors.
    extra_compile_args=["-O3", "-fno-trapping-math", "-fopenmp"],
    extra_link_args=["-fopenmp"],
)


def find_nvcc() -> str | None:
    """The CUDA compiler to use; None where there is none or MRPO_CUDA=0.

    Raises:
        ValueError: MRPO_CUDA is neither 0 nor 1.
        FileNotFoundError: MRPO_CUDA=1 or NVCC demands a compiler that is not there.
    """
    wish, named, home = (os.environ.get(name, "") for name in ("MRPO_CUDA", "NVCC", "CUDA_HOME"))
    if wish not in ("", "0", "1"):
        raise ValueError(f"MRPO_CUDA must be 0 or 1, not {wish!r}")
    if wish == "0":
        return None
    found = shutil.which(named or "nvcc", path=None if named or not home else os.path.join(home, "bin"))
    found = found or (None if named else shutil.which("nvcc"))
    if found is None and (named or wish == "1"):
        demand = f"NVCC={named}" if named else "MRPO_CUDA=1"
        raise FileNotFoundError(
            f"{demand}, but there is no such compiler: install CUDA 12.1 or newer, or set MRPO_CUDA=0"
        )
    return found


def cuda_targets(known: list[str]) -> list[str]:
    """What to compile for, of the generations that a compiler knows: MRPO_CUDA_TARGETS, or all of `CUDA_TARGETS`.

    Raises:
        ValueError: MRPO_CUDA_TARGETS names another target.
    """
    targets = [target for generation, target in CUDA_TARGETS.items() if generation in known]
    wish = os.environ.get("MRPO_CUDA_TARGETS", "").split()
    if unknown := [target for target in wish if target not in targets]:
        raise ValueError(f"MRPO_CUDA_TARGETS may name {', '.join(targets)}, with spaces between, not {unknown[0]!r}")
    return [target for target in targets if target in wish] or targets


def cuda_home(nvcc: str) -> Path:
    """Where nvcc's own files lie; nvcc on PATH may be a script that calls another, so nvcc itself is asked."""
    said = run(nvcc, "--dryrun", "-c", "-x", "cu", "-o", os.devnull, os.devnull)
    for line in said.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def run(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise CCompilerError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def code_options(targets: list[str]) -> list[str]:
    """nvcc's options for machine code of each target and PTX of the last."""
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    portable = targets[-1].removesuffix("a")
    return [*codes, f"-gencode=arch=compute_{portable},code=compute_{portable}"]


class BuildExtension(build_ext):
    """Adds the CUDA part where it can be built, and says what is missing when a compiler is."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        self.force = True  # what it is made of depends on the environment, too, which file times do not tell
        nvcc, architectures = find_nvcc(), ""
        if nvcc is None:
            reason = "MRPO_CUDA=0" if os.environ.get("MRPO_CUDA") == "0" else "no nvcc in $NVCC, $CUDA_HOME or PATH"
            self.warn(f"mrpo._C is built without its CUDA part: {reason}. On a GPU the policy loss runs in Triton")
        else:
            architectures = self.build_cuda(extension, nvcc)
        extension.define_macros.append(("MRPO_CUDA_ARCHITECTURES", f'"{architectures}"'))
        try:
            super().build_extension(extension)
        except (CCompilerError, OSError) as error:
            raise CCompilerError(
                f"{error}\n\nmrpo._C needs a C++17 compiler with OpenMP, such as g++ 9 or newer (Debian: apt install "
                "g++). MRPO_CPP=0 pip install ... installs without it: the policy loss then runs in plain PyTorch."
            ) from error

    def build_cuda(self, extension: Pybind11Extension, nvcc: str) -> str:
        """Compiles the CUDA part and has it linked, with a static CUDA runtime; what it was compiled for."""
        output = Path(self.build_temp) / "policy_loss_cuda.o"
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            targets = cuda_targets(run(nvcc, "--list-gpu-code").split())
            options = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
            run(nvcc, "-c", CUDA_SOURCE, "-o", str(output), *options, *code_options(targets))
            home = cuda_home(nvcc)
        except (CCompilerError, OSError, IndexError) as error:
            raise CCompilerError(
                f"{error}\n\nnvcc ({nvcc}) cannot compile the CUDA part of mrpo._C, which needs CUDA 12.1 or newer. "
                "MRPO_CUDA=0 pip install ... installs without it: on a GPU the policy loss then runs in Triton."
            ) from error
        folders = (home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib"))
        extension.extra_objects.append(str(output))
        extension.library_dirs += [str(folder) for folder in folders if folder.is_dir()]
        extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
        extension.define_macros.append(("MRPO_CUDA", "1"))
        return " ".join(f"sm_{target}" for target in targets)


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["mrpo", "mrpo.*"]), "mrpo.kernels"],
        package_dir={"mrpo.kernels": "kernels"},
        ext_modules=[] if os.environ.get("MRPO_CPP") == "0" else [CPU_EXTENSION],
        cmdclass={"build_ext": BuildExtension},
    )
