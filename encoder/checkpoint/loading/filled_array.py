"""An MLX array whose memory a Python function writes. A large one is not copied.

MLX has no function that returns an unwritten array. But `mx.load` reads from a file object, and passes it the memory of
the array to write to.
"""

import json
import os
import struct
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

_MAX_COPIED_BYTES = 2**16  # up to here a copy takes a third of the time of `mx.load`
_DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "I8": mx.int8,
    "U8": mx.uint8,
    "U32": mx.uint32,
}

Fill = Callable[[memoryview], None]


def filled_array(kind: str, shape: tuple[int, ...], nbytes: int, fill: Fill) -> mx.array:
    """An evaluated array whose bytes `fill` writes.

    Args:
        kind: dtype, as safetensors spells it.
        shape: in elements.
        nbytes: size of the array.
        fill: called once, perhaps on another thread, with memory to write to; must not keep a reference to it.
    Errors: those of `fill`.
    """
    if 0 < nbytes <= _MAX_COPIED_BYTES:
        return _copied(kind, shape, nbytes, fill)
    header = json.dumps({"array": {"dtype": kind, "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    file: Any = _File(struct.pack("<Q", len(header)) + header, nbytes, fill)
    arrays = mx.load(file, format="safetensors")
    if file.error is not None:
        raise file.error
    assert isinstance(arrays, dict)
    return arrays["array"]


def _copied(kind: str, shape: tuple[int, ...], nbytes: int, fill: Fill) -> mx.array:
    memory = bytearray(nbytes)
    fill(memoryview(memory))
    array = mx.array(np.frombuffer(memory, np.uint8)).view(_DTYPES[kind]).reshape(shape)
    mx.eval(array)
    return array


class _File:
    """Looks like a safetensors file with one array to `mx.load`; `fill` writes the data."""

    closed = False

    def __init__(self, header: bytes, nbytes: int, fill: Fill) -> None:
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
            self._fill(memory)
        # `filled_array` raises it: this may run on a thread of MLX, which an exception would end.
        except Exception as error:  # noqa: BLE001
            self.error = error
