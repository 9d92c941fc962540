"""Matrices laid out for encoder/panels.c, as MLX arrays that a product can take.

Knows nothing of layers; encoder/packed_weights.py says what is laid out.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.blas import panels_library
from encoder.filled_array import filled

ROOM = 192  # bytes, at least what `panels_offset` may answer


def has_panels() -> bool:
    """Whether the library was compiled, and stands before the BLAS."""
    return panels_library() is not None


def lay(matrices: Sequence[NDArray[Any]], threads: Executor) -> mx.array:
    """Matrices (out, in), one after the other, as one (in, all outputs), evaluated.

    It is for the right side of `x @ matrix`, and for nothing else: its memory has another order, and half the size for
    bfloat16.

    Args:
        matrices: of float32 or of bfloat16's bits as uint16.
        threads: that share the work.
    """
    library = panels_library()
    assert library is not None
    rows = np.concatenate(matrices) if len(matrices) > 1 else np.ascontiguousarray(matrices[0])
    (outputs, inputs), is_bfloat16 = rows.shape, rows.dtype == np.uint16
    columns, panel_bytes = library.panels_columns(is_bfloat16), library.panels_bytes(inputs, is_bfloat16)
    nbytes = -(-outputs // columns) * panel_bytes + ROOM
    offset = 0

    def fill(memory: memoryview) -> None:
        nonlocal offset
        address = np.frombuffer(memory, np.uint8).ctypes.data
        offset = library.panels_offset(address)
        library.panels_mark(address + offset, inputs, outputs, is_bfloat16)

        def fill_panel(column: int) -> None:
            panel = address + offset + column // columns * panel_bytes
            weights = rows[column:]
            library.panels_lay(weights.ctypes.data, inputs, len(weights), is_bfloat16, panel)

        list(threads.map(fill_panel, range(0, outputs, columns)))

    memory = filled("F32", (nbytes // 4,), nbytes, fill)
    matrix = mx.as_strided(memory, (inputs, outputs), (outputs, 1), offset // 4)
    mx.eval(matrix)
    return matrix
