"""Matrices laid out for kernels/c/panels.c, and its operations, as MLX arrays on the right side of a product.

MLX takes no operation of ours on a CPU; what it calls for `x @ y` looks whether y is one of these.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.checkpoint.loading.filled_array import filled
from encoder.qwen3.cpu.blas import panels_library
from encoder.qwen3.cpu.panels_library import Attention, Batch, Mlp

ROOM = 192  # bytes, at least what `panels_offset` may answer
OPERATION = 64  # bytes of one, behind its mark


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


def address_of(matrix: mx.array) -> int:
    """Of a matrix's panels. Its owner keeps it while the address is in use."""
    return int(np.array(matrix, copy=False).ctypes.data)


def operation(size: int, layer: Mlp | Attention, batch: Batch | None = None) -> mx.array:
    """An MLP, or an attention for the batch described at `batch`: `x @ operation` is what it makes of x.

    Both are (rows, size). What the fields point to has to stay for as long as it is used, and so have those of an
    attention and of a batch themselves: they are read when MLX evaluates.
    """
    library = panels_library()
    assert library is not None
    memory = mx.array(np.zeros((ROOM + OPERATION) // 4, np.float32))
    start = np.array(memory, copy=False).ctypes.data
    offset = library.panels_offset(start)
    if isinstance(layer, Mlp):
        library.panels_mark_mlp(start + offset, layer)
    else:
        library.panels_mark_attention(start + offset, layer, batch)
    marked = mx.as_strided(memory, (size, size), (size, 1), offset // 4)
    mx.eval(marked)
    return marked
