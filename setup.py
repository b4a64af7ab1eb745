"""What pyproject.toml cannot say: the extension mrpo._C, and that the folder kernels/ is the package mrpo.kernels."""

import os

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CCompilerError

CPU_EXTENSION = Pybind11Extension(
    "mrpo._C",
    sources=["csrc/bindings.cpp", "csrc/policy_loss_cpu.cpp"],
    depends=["csrc/policy_loss.h"],
    cxx_std=17,
    # Without the second flag compilers keep branches in a loop for the sake of floating-point traps: no AVX2 vectors.
    extra_compile_args=["-O3", "-fno-trapping-math", "-fopenmp"],
    extra_link_args=["-fopenmp"],
)


class BuildExtension(build_ext):
    """A build that says what is missing when there is no compiler that can do it."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        try:
            super().build_extension(extension)
        except (CCompilerError, OSError) as error:
            raise CCompilerError(
                f"{error}\n\nmrpo._C needs a C++17 compiler with OpenMP, such as g++ 9 or newer (Debian: apt install "
                "g++). MRPO_CPP=0 pip install ... installs without it: the policy loss then runs in plain PyTorch."
            ) from error


setup(
    packages=[*find_packages(include=["mrpo", "mrpo.*"]), "mrpo.kernels"],
    package_dir={"mrpo.kernels": "kernels"},
    ext_modules=[] if os.environ.get("MRPO_CPP") == "0" else [CPU_EXTENSION],
    cmdclass={"build_ext": BuildExtension},
)
