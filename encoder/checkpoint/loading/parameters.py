"""Reads stored tensors, one after the other, as the parameters that they become in memory, evaluated and checked."""

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

import mlx.core as mx

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.array_reader import ArrayReader, read_ahead
from encoder.checkpoint.loading.residency import Resident
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.errors import CheckpointError
from encoder.pipeline.finite import is_finite, is_float

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


def read_parameters(
    checkpoint: Checkpoint, residents: Mapping[str, Resident], progress: Progress | None = None
) -> Iterator[dict[str, mx.array]]:
    """The parameters that each tensor becomes, by name: one of floats, several of a quantized tensor.

    Errors: CheckpointError for a tensor that cannot be read, and for NaN or infinity.
    """
    total = sum(resident.stored.nbytes for resident in residents.values())
    done = 0
    in_order = sorted(residents.values(), key=_file_position)  # reading front to back is fastest
    checked: set[Path] = set()
    with ArrayReader() as reader:
        for resident, following in zip_longest(in_order, in_order[1:]):
            arrays = resident.stored.arrays
            read_ahead(following.stored.arrays.values() if following else ())
            for file in {array.file for array in arrays.values()} - checked:
                checkpoint.weights.check_file(file)
                checked.add(file)
            yield _read(resident, reader)
            done += resident.stored.nbytes
            if progress is not None:
                progress(done, total)


def _file_position(resident: Resident) -> tuple[Path, int]:
    array = resident.stored.arrays["weight"]
    return array.file, array.offset


def _read(resident: Resident, reader: ArrayReader) -> dict[str, mx.array]:
    tensor = resident.stored
    if resident.is_exact:
        return {tensor.name: reader.read_floats(tensor.arrays["weight"], resident.dtype)}
    parameters = resident.parameters({role: reader.read(array) for role, array in tensor.arrays.items()})
    mx.eval(*parameters.values())
    mx.clear_cache()  # else the allocator keeps the stored tensor's buffer
    _check_finite(parameters, resident)
    return parameters


def _check_finite(parameters: Mapping[str, mx.array], resident: Resident) -> None:
    tensor = resident.stored
    for array in parameters.values():
        if is_float(array):
            finite = bool(is_finite(array).item())
        else:
            finite = array.dtype != mx.uint8 or _scales_are_finite(array, resident.quantization)
        if not finite:
            raise CheckpointError(
                f"{tensor.file.name}: {tensor.key} has NaN or infinity as {array.dtype}, expected finite weights. "
                f"Fetch the file again; if it is stored so, it cannot be served."
            )


def _scales_are_finite(scales: mx.array, quantization: Quantization | None) -> bool:
    """Whether no 8-bit scale is NaN: float8_e4m3fn of either sign in nvfp4, powers of two in the other modes."""
    if quantization is not None and quantization.mode == "nvfp4":
        return _max(scales & 0x7F) < 0x7F
    return _max(scales) < 0xFF


def _max(integers: mx.array) -> int:
    largest = mx.max(integers).item()
    assert isinstance(largest, int)
    return largest
