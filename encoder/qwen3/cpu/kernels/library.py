"""The compiled kernels: which library this CPU can run, and its functions with NumPy arrays for arguments.

setup.py compiles c/layers.c once for each instruction set. Without a compiler there is no library, and `load_kernels`
finds none. Structures here have the same fields as those in C. Calls release the GIL and run on threads of their own.
"""

import ctypes
import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
CPUINFO = Path("/proc/cpuinfo")
# Fastest first, with the names in /proc/cpuinfo of what a CPU needs for it.
INSTRUCTION_SETS = {
    "amx": {"amx_tile", "amx_bf16", "avx512f"},
    "avx512": {"avx512f"},
    "avx2": {"avx2", "fma"},
    "neon": {"asimd"},
}
ALIGNMENT = 64  # bytes, of panels

Matrix = NDArray[Any]  # (outputs, inputs), float32, or the bits of bfloat16 as uint16
Numbers = NDArray[np.float32]


class Dims(ctypes.Structure):
    """The dims of a model, in C."""

    _fields_ = (
        ("hidden_size", ctypes.c_int32),
        ("intermediate_size", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
        ("rms_norm_eps", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """Addresses of one layer's weights, in C. Whoever makes one keeps the arrays."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("qkv", "o", "gate_up", "down", "input_norm", "post_attention_norm", "q_norm", "k_norm")
    )


class Batch(ctypes.Structure):
    """Where the rows of a batch stand, in C. Whoever makes one keeps the arrays."""

    _fields_ = (
        ("spans", ctypes.c_void_p),  # (prompts, 4) int32: start, stop, live, live_stop
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("span_count", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("token_rows", ctypes.c_int32),
    )


class Kernels:
    """The functions of one compiled library.

    Args:
        instruction_set: a key of INSTRUCTION_SETS.
        path: of the library.
    Attributes:
        max_head_dim: the largest head that they have room for.
    Errors: OSError when the library cannot be loaded, or the system refuses the instruction set to this process.
    """

    def __init__(self, instruction_set: str, path: Path) -> None:
        self.instruction_set = instruction_set
        self._library = _declare(ctypes.CDLL(str(path)))
        refused = self._library.qwen3_start()
        if refused:
            raise OSError(refused, f"the system refuses {instruction_set} to this process")
        self.max_head_dim = int(self._library.qwen3_max_head_dim())

    def prepack(self, matrices: Sequence[Matrix], threads: int, *, interleave: bool = False) -> NDArray[np.uint8]:
        """Panels of matrices that are multiplied with the same rows, aligned for the kernels.

        Args:
            matrices: (outputs, inputs) each, with the same inputs and dtype.
            threads: that share the work.
            interleave: a panel of each matrix in turns; else all panels of a matrix before those of the next.
        Errors: ValueError for matrices of several dtypes or numbers of inputs.
        """
        inputs, bfloat16 = matrices[0].shape[1], matrices[0].dtype == np.uint16
        if any(matrix.shape[1] != inputs or matrix.dtype != matrices[0].dtype for matrix in matrices):
            found = ", ".join(f"{matrix.dtype} {matrix.shape}" for matrix in matrices)
            raise ValueError(f"matrices to prepack together: found {found}, expected the same dtype and inputs.")
        columns = self._library.qwen3_panel_columns(bfloat16)
        panel_bytes = self._library.qwen3_panel_bytes(inputs, bfloat16)
        counts = [-(-len(matrix) // columns) for matrix in matrices]
        panels = aligned_bytes(sum(counts) * panel_bytes)
        for number, matrix in enumerate(matrices):
            first = number if interleave else sum(counts[:number])
            rows = np.ascontiguousarray(matrix)
            self._library.qwen3_prepack(
                rows.ctypes.data,
                *(inputs, len(rows), bfloat16, panels.ctypes.data + first * panel_bytes),
                *(len(matrices) if interleave else 1, threads),
            )
        return panels

    def run_layers(self, dims: Dims, layers: Any, count: int, batch: Batch, x: Numbers, threads: int) -> None:
        """Run `count` layers over the rows x, (rows, hidden_size), in place.

        Args:
            layers: a ctypes array of Layer, or a pointer into one.
        Errors: MemoryError; x is unchanged then.
        """
        _check(
            self._library.qwen3_run_layers(
                ctypes.byref(dims), layers, count, ctypes.byref(batch), x.ctypes.data, threads
            )
        )

    def multiply(self, x: Numbers, panels: NDArray[np.uint8], outputs: int, bfloat16: bool, threads: int) -> Numbers:
        """x @ matrix, (rows, inputs) to (rows, outputs): a product of the pass by itself, for tests and benchmarks."""
        product = np.zeros((len(x), outputs), np.float32)
        addresses = x.ctypes.data, len(x), product.ctypes.data
        _check(self._library.qwen3_multiply(panels.ctypes.data, x.shape[1], outputs, bfloat16, *addresses, threads))
        return product


def load_kernels() -> Kernels | None:
    """The kernels for the fastest instruction set that was compiled and that this CPU has, or None."""
    for name in INSTRUCTION_SETS:
        path = library_path(name)
        if not path.exists() or not has_instructions(name):
            continue
        try:
            return Kernels(name, path)
        except (OSError, AttributeError) as error:  # AttributeError: a library without our functions
            logger.warning("compiled kernels for %s cannot be used: %s", name, error)
    return None


def library_path(instruction_set: str) -> Path:
    """Where the library for an instruction set is, if it was compiled."""
    return FOLDER / f"layers_{instruction_set}.so"


def has_instructions(name: str) -> bool:
    """Whether this CPU has all that an instruction set needs; never on macOS and Windows."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return False
    return any(
        INSTRUCTION_SETS[name] <= set(line.partition(":")[2].split())
        for line in lines
        if line.startswith(("flags", "Features"))  # on x86, on ARM
    )


def aligned_bytes(nbytes: int) -> NDArray[np.uint8]:
    """So many bytes that start at a multiple of ALIGNMENT, not initialized."""
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + nbytes]


def _check(error: int) -> None:
    if error == errno.ENOMEM:
        raise MemoryError("No memory for a forward pass on the CPU. Run smaller batches: lower max_batch_tokens.")


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of its functions' arguments: addresses do not fit into an int."""
    address, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.qwen3_panel_bytes.restype = size
    library.qwen3_prepack.argtypes = [address, integer, integer, integer, address, integer, integer]
    library.qwen3_prepack.restype = None
    library.qwen3_run_layers.argtypes = [address, address, integer, address, address, integer]
    library.qwen3_multiply.argtypes = [address, integer, integer, integer, address, integer, address, integer]
    return library
