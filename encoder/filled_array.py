"""An MLX array that a function of ours writes, in MLX's own buffer: nothing is copied.

MLX hands no empty buffer out, but `mx.load` reads from a file object into one, whose memory is new to the process.
"""

import ctypes
import json
import mmap
import os
import struct
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

_HUGE_PAGE = 2**21


def filled(kind: str, shape: tuple[int, ...], nbytes: int, fill: Callable[[memoryview], None]) -> mx.array:
    """An array whose bytes `fill` writes, evaluated.

    Args:
        kind: dtype, as safetensors spells it.
        shape: in elements.
        nbytes: that go with them.
        fill: called once, perhaps on another thread; keeps nothing of its argument.
    Errors: those of `fill`.
    """
    header = json.dumps({"array": {"dtype": kind, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    file: Any = _File(struct.pack("<Q", len(header)) + header, nbytes, fill)
    arrays = mx.load(file, format="safetensors")
    if file.error is not None:
        raise file.error
    assert isinstance(arrays, dict)
    return arrays["array"]


class _File:
    """What `mx.load` takes for a safetensors file with one array, whose data `fill` writes."""

    closed = False

    def __init__(self, header: bytes, nbytes: int, fill: Callable[[memoryview], None]) -> None:
        self._header, self._size, self._fill = header, len(header) + nbytes, fill
        self._position = 0
        self.error: Exception | None = None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]

    def readinto(self, memory: memoryview) -> int:
        if self._position < len(self._header):
            memory[:] = self._header[self._position : self._position + len(memory)]
        else:
            self._fill_all(memory)
        self._position += len(memory)
        return len(memory)

    def _fill_all(self, memory: memoryview) -> None:
        try:
            _ask_for_huge_pages(memory)
            self._fill(memory)
        except Exception as error:  # kept from MLX's threads, on which this runs
            self.error = error


def _ask_for_huge_pages(memory: memoryview) -> None:
    """A page fault costs about as much for 2 MiB as for 4 KiB, and Linux gives large pages where it is asked."""
    if len(memory) < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    begin = np.frombuffer(memory, np.uint8).ctypes.data
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + len(memory)) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
