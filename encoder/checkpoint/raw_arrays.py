"""Reads an array from its place in a file, whatever the file's format. One copy, on the calling thread."""

import os
from collections.abc import Iterable
from contextlib import suppress

import mlx.core as mx
import numpy as np

from encoder.checkpoint.weights import StoredArray
from encoder.errors import CheckpointError

_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I8": mx.int8, "U32": mx.uint32}


def read_ahead(arrays: Iterable[StoredArray]) -> None:
    """Let the disk fetch arrays into the page cache while others are being decoded; a hint, taken on Linux alone."""
    if not hasattr(os, "posix_fadvise"):
        return
    for array in arrays:
        with suppress(OSError), array.file.open("rb") as file:
            os.posix_fadvise(file.fileno(), array.offset, array.nbytes, os.POSIX_FADV_WILLNEED)


def read_bytes(array: StoredArray) -> mx.array:
    """All bytes of the array, (nbytes,) uint8. Errors: CheckpointError when they are no longer there."""
    try:
        data = np.fromfile(array.file, np.uint8, array.nbytes, offset=array.offset)
    except OSError as error:
        raise CheckpointError(f"{array.file}: {array.key} cannot be read: {error}") from error
    if data.nbytes != array.nbytes:
        raise CheckpointError(f"{array.file}: {array.key} cannot be read: the file is shorter than it was.")
    return mx.array(data)


def read_array(array: StoredArray) -> mx.array:
    """The array in its shape; a dtype that MLX does not have as uint8."""
    return read_bytes(array).view(_DTYPES.get(array.dtype, mx.uint8)).reshape(array.shape)
