"""Builds the CPU kernels on Linux, one shared library for each instruction set, and tags the wheel that carries them.

Everything else is in pyproject.toml. Without a C compiler the package installs too, and the encoder computes with MLX
over a BLAS. QWEN3_ENCODER_REQUIRE_KERNELS=1 makes a kernel that does not compile an error; wheels are built with it.
"""

import os
import platform
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "encoder/qwen3/cpu/kernels/c"
# Compiler flags by instruction set. The names are those of encoder/qwen3/cpu/kernels/library.py.
INSTRUCTION_SETS = {
    "x86_64": {
        "amx": ["-mavx512f", "-mamx-tile", "-mamx-bf16"],
        "avx512": ["-mavx512f"],
        "avx2": ["-mavx2", "-mfma"],
    },
    "aarch64": {"neon": []},
}


class SharedLibraries(build_ext):
    """Names a library `layers_avx2.so`: ctypes loads it, so it is the same for every version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """Tags a wheel `py3-none-linux_x86_64`: one for each platform. A wheel without kernels is `py3-none-any`."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def shared_library(name: str, source: str, flags: list[str]) -> Extension:
    """A library of the package encoder.qwen3.cpu.kernels."""
    return Extension(
        f"encoder.qwen3.cpu.kernels.{name}",
        [f"{SOURCES}/{source}"],
        depends=sorted(glob(f"{SOURCES}/*.h")),  # the source distribution carries these two lists
        extra_compile_args=["-std=gnu11", "-O3", "-fopenmp-simd", "-pthread", *flags],
        extra_link_args=["-pthread"],
        libraries=["m"],
        optional="QWEN3_ENCODER_REQUIRE_KERNELS" not in os.environ,
    )


sets = INSTRUCTION_SETS.get(platform.machine(), {}) if sys.platform == "linux" else {}
libraries = [shared_library(f"layers_{name}", "layers.c", flags) for name, flags in sets.items()]
if sets:
    libraries.append(shared_library("blas_shim", "blas_shim.c", []))
setup(cmdclass={"build_ext": SharedLibraries, "bdist_wheel": PlatformWheel}, ext_modules=libraries)
