"""What pyproject.toml cannot say: the compiled kernels, for each instruction set of such machines.

Without a C compiler the package installs all the same, and multiplies through its BLAS alone.
"""

import platform
import sys

from setuptools import Extension, setup

INSTRUCTION_SETS = {
    "x86_64": {
        "amx": ["-mavx512f", "-mamx-tile", "-mamx-bf16"],
        "avx512": ["-mavx512f"],
        "avx2": ["-mavx2", "-mfma"],
    },
    "aarch64": {"neon": []},
}

sets = INSTRUCTION_SETS.get(platform.machine(), {}) if sys.platform == "linux" else {}
setup(
    ext_modules=[
        Extension(
            f"encoder.qwen3.cpu.kernels.panels_{name}",
            ["encoder/qwen3/cpu/kernels/c/panels.c"],
            depends=["encoder/qwen3/cpu/kernels/c/panels_amx.h", "encoder/qwen3/cpu/kernels/c/panels_layer.h"],
            extra_compile_args=["-std=gnu11", "-O3", "-fopenmp-simd", *flags],
            libraries=["m"],
            optional=True,
        )
        for name, flags in sets.items()
    ]
)
