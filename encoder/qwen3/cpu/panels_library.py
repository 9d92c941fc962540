"""Finds the library of kernels/c/panels.c that this CPU can run, puts it before a BLAS, and describes its functions.

Knows the dynamic linker and nothing of tensors; does not import MLX.
"""

import ctypes
import importlib.machinery
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "kernels"  # where setup.py puts the libraries, named as extension modules
CPUINFO = Path("/proc/cpuinfo")
# Fastest first, with what /proc/cpuinfo calls that which a CPU needs for it.
INSTRUCTION_SETS = {
    "amx": {"amx_tile", "amx_bf16", "avx512f"},
    "avx512": {"avx512f"},
    "avx2": {"avx2", "fma"},
    "neon": {"asimd"},
}


def _fields(pointers: str, *others: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Of a structure that begins with pointers, by their names."""
    return [*((name, ctypes.c_void_p) for name in pointers.split()), *others]


class Mlp(ctypes.Structure):
    """An MLP, as encoder/qwen3/cpu/kernels/c/panels_layer.h has it. Here as there, pointers are not owned."""

    _fields_ = _fields("gate_up down norm", ("epsilon", ctypes.c_float))


class Attention(ctypes.Structure):
    """An attention of encoder/qwen3/cpu/kernels/c/panels_layer.h."""

    _fields_ = _fields(
        "qkv o norm q_norm k_norm",
        ("epsilon", ctypes.c_float),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
    )


class Batch(ctypes.Structure):
    """What an attention is told of a batch, see encoder/qwen3/cpu/kernels/c/panels_layer.h."""

    _fields_ = _fields("spans cos sin", ("span_count", ctypes.c_int32), ("real_rows", ctypes.c_int32))


def instruction_set() -> str | None:
    """The fastest one that was compiled, that this CPU has and that may be used; None where there is none."""
    return next((name for name in INSTRUCTION_SETS if can_run(name) and can_start(name)), None)


def can_run(name: str) -> bool:
    """Whether this CPU has all that an instruction set needs; never on macOS."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return False
    return any(
        INSTRUCTION_SETS[name] <= set(line.partition(":")[2].split())
        for line in lines
        if line.startswith(("flags", "Features"))  # on x86, on ARM
    )


def find(name: str) -> Path | None:
    """The library for an instruction set."""
    candidates = (FOLDER / f"panels_{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def can_start(name: str) -> bool:
    """Whether it is there and whole; and the kernel may refuse a process the registers of AMX."""
    path = find(name)
    try:
        return path is not None and ctypes.CDLL(str(path)).panels_start() == 0
    except (OSError, AttributeError):  # no library, or one without our functions
        return False


def stand_before(blas: ctypes.CDLL, name: str) -> ctypes.CDLL:
    """Load the library, which from now on is what `cblas_sgemm` means in this process, and give it the BLAS's own.

    Args:
        blas: loaded, and not yet in the process's global scope.
        name: as `instruction_set` says.
    Errors: OSError when it cannot be loaded.
    """
    library = declare(ctypes.CDLL(str(find(name)), ctypes.RTLD_GLOBAL))
    _next(library).value = ctypes.cast(blas.cblas_sgemm, ctypes.c_void_p).value
    return library


def product_behind(library: ctypes.CDLL) -> int | None:
    """Address of the `cblas_sgemm` that the library gives other products to."""
    return _next(library).value


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions' arguments: addresses do not fit into an int."""
    address, integer = ctypes.c_void_p, ctypes.c_int
    library.panels_columns.argtypes = [integer]
    library.panels_bytes.argtypes = [integer, integer]
    library.panels_bytes.restype = ctypes.c_size_t
    library.panels_offset.argtypes = [address]
    library.panels_mark.argtypes = [address, integer, integer, integer]
    library.panels_lay.argtypes = [address, integer, integer, integer, address]
    library.panels_mark_mlp.argtypes = [address, ctypes.POINTER(Mlp)]
    library.panels_mark_attention.argtypes = [address, ctypes.POINTER(Attention), ctypes.POINTER(Batch)]
    return library


def _next(library: ctypes.CDLL) -> ctypes.c_void_p:
    return ctypes.c_void_p.in_dll(library, "panels_next")
