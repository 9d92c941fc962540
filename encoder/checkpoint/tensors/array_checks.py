"""Whether the arrays of a quantized weight fit each other: their dtypes, shapes and groups."""

from collections.abc import Mapping

from encoder.checkpoint.tensors.encodings import FLOATS
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError

Shape = tuple[int, ...]
Expected = dict[str, tuple[tuple[str, ...], Shape]]  # by role: the dtypes that an array may have, and its shape

FLOAT_DTYPES = tuple(FLOATS)
ONE_NUMBER: tuple[Shape, ...] = ((), (1,), (1, 1))  # shapes of one scale for a whole weight


def is_per_row(scales: Shape, weight: Shape) -> bool:
    """Whether scales of this shape are one for the weight, or one for each of its rows."""
    return scales in (*ONE_NUMBER, weight[:1], (*weight[:1], 1))


def check_arrays(label: str, arrays: Mapping[str, StoredArray], expected: Expected) -> None:
    """Compare arrays with the dtypes and the shape that each must have.

    Args:
        label: of the quantization, for the message.
        arrays: of one tensor; "weight" is there.
        expected: by role. Roles that are not named may be there or not.
    Errors: CheckpointError naming the first array that is missing or does not fit.
    """
    weight = arrays["weight"]
    for role, (dtypes, shape) in expected.items():
        array = arrays.get(role)
        wanted = f"{' or '.join(dtypes)} {shape} for {label}"
        if array is None:
            raise CheckpointError(f"{weight.file.name}: {weight.key} has no {role} beside it, expected {wanted}.")
        if array.dtype not in dtypes or array.shape != shape:
            raise CheckpointError(f"{array.file.name}: {array.key} is {array.dtype} {array.shape}, expected {wanted}.")


def check_groups(label: str, weight: StoredArray, groups: int, columns: int) -> None:
    """Errors: CheckpointError where the columns of a weight are not whole groups."""
    if groups < 1 or columns < 1 or columns % groups:
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} of {label} has {columns} columns in {groups} groups, expected whole "
            f"groups."
        )
