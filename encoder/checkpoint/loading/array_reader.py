"""Reads arrays from files of any format into the memory that MLX computes with.

Beside the disk, loading waits for memory that the process touches for the first time. So only the result is new memory.
A few threads read one piece each, which stays in the CPU's cache, check it, and write it to the result, widened to
float32 where that is asked.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.checkpoint.loading.filled_array import filled_array
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.regular_file import open_file

Bytes = NDArray[np.uint8]
Widen = Callable[[Bytes, Bytes], None]  # from stored floats to float32, written to the second argument

_MAX_THREADS = 4
_PIECE_BYTES = 2**20
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U32": 4, "U8": 1}  # of the dtypes that MLX has, too
_FLOATS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
_INFINITY: dict[str, tuple[Any, Any, int]] = {  # integers of the same width, and the bits of infinity
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
}


class ArrayReader:
    """Reads one array at a time, on a few threads. A context manager: leaving it ends the threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="reader")
        self._scratch = threading.local()

    def __enter__(self) -> "ArrayReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def read(self, array: StoredArray) -> mx.array:
        """The array as it is stored; of a dtype that MLX does not have, its bytes as uint8.

        Errors: CheckpointError when the file is gone or has changed, or the array has NaN or infinity.
        """
        return self._read(array, array.dtype if array.dtype in _ITEM_BYTES else "U8", None)

    def read_floats(self, array: StoredArray, dtype: mx.Dtype) -> mx.array:
        """Stored floats, in their own dtype or in float32, which holds each of them exactly. Errors: as of `read`."""
        kind = _FLOATS[dtype]
        return self._read(array, kind, None if array.dtype == kind else _WIDEN[array.dtype])

    def _read(self, array: StoredArray, kind: str, widen: Widen | None) -> mx.array:
        nbytes = array.nbytes * (2 if widen else 1)
        if prod(array.shape) * _ITEM_BYTES[kind] != nbytes:
            raise CheckpointError(f"{array.file}: {array.key} has dtype {array.dtype}, which cannot be read.")
        try:
            return filled_array(kind, array.shape, nbytes, lambda memory: self._fill(memory, array, widen))
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{array.file}: {array.key} cannot be read: {error}") from error

    def _fill(self, memory: memoryview, array: StoredArray, widen: Widen | None) -> None:
        """Read the array into `memory`, piece by piece."""
        starts = range(0, array.nbytes, _PIECE_BYTES)
        with open_file(array.file) as file:
            if len(starts) == 1:
                return self._read_piece(file.fileno(), 0, memory, array, widen)
            pieces = [
                self._threads.submit(self._read_piece, file.fileno(), start, memory, array, widen) for start in starts
            ]
            wait(pieces)  # all of them: after this function returns, `memory` may be freed
            for piece in pieces:
                piece.result()

    def _read_piece(
        self, descriptor: int, start: int, memory: memoryview, array: StoredArray, widen: Widen | None
    ) -> None:
        """Read the piece that begins at byte `start` of the array, check it, and write it to its place in `memory`."""
        size = min(_PIECE_BYTES, array.nbytes - start)
        factor = 2 if widen else 1
        target = np.frombuffer(memory[start * factor : (start + size) * factor], np.uint8)
        stored = self._scratch_memory(size) if widen else target
        if os.preadv(descriptor, [stored.data], array.offset + start) != size:
            raise CheckpointError(f"{array.file}: {array.key} cannot be read: the file has been changed.")
        _check_finite(stored, array)
        if widen:
            widen(stored, target)

    def _scratch_memory(self, size: int) -> Bytes:
        """Scratch memory of this thread, reused for each piece."""
        if not hasattr(self._scratch, "piece"):
            self._scratch.piece = np.empty(_PIECE_BYTES, np.uint8)
        piece: Bytes = self._scratch.piece[:size]
        return piece


def read_ahead(arrays: Iterable[StoredArray]) -> None:
    """Ask the kernel to fetch arrays into the page cache while others are read. Does nothing outside Linux."""
    if not hasattr(os, "posix_fadvise"):
        return
    for array in arrays:
        with suppress(OSError), open_file(array.file) as file:
            os.posix_fadvise(file.fileno(), array.offset, array.nbytes, os.POSIX_FADV_WILLNEED)


def _check_finite(piece: Bytes, array: StoredArray) -> None:
    """Raise CheckpointError when a float is NaN or infinite.

    As signed integers, +inf and the positive NaNs are the largest; as unsigned ones, -inf and the negative NaNs.
    """
    if array.dtype not in _INFINITY or not piece.size:
        return
    signed, unsigned, infinity = _INFINITY[array.dtype]
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    if piece.view(signed).max() >= infinity or piece.view(unsigned).max() >= sign + infinity:
        raise CheckpointError(
            f"{array.file.name}: {array.key} has NaN or infinity, expected finite weights. "
            f"Fetch the file again; if it is stored so, it cannot be served."
        )


def _widen_bfloat16(stored: Bytes, target: Bytes) -> None:
    """bfloat16 is the upper half of a float32."""
    np.left_shift(stored.view(np.uint16), np.uint32(16), out=target.view(np.uint32), dtype=np.uint32)


def _widen_float16(stored: Bytes, target: Bytes) -> None:
    np.copyto(target.view(np.float32), stored.view(np.float16))


_WIDEN = {"BF16": _widen_bfloat16, "F16": _widen_float16}
