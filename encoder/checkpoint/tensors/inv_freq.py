"""RoPE's frequencies, where a file holds them: mflux saves them, and so did transformers until 2023."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from encoder.checkpoint.tensors.families import QWEN3_THETA, QWEN3_VL_THETA
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError

_NAME = "rotary_emb.inv_freq"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_RELATIVE = {"F64": 1e-5, "F32": 1e-5, "F16": 2e-3, "BF16": 8e-3}  # twice and more of what rounding changes
_ABSOLUTE = {"F16": 6e-8}  # the smallest number that it has
_MAX_BYTES = 2**14
_MAX_ARRAYS = 256  # older files have one in each layer


def theta_from_frequencies(arrays: Iterable[StoredArray], head_dim: int) -> float | None:
    """The rope_theta that the frequencies in a file follow from; None where it holds none.

    Args:
        arrays: all in the file.
        head_dim: of the model; half of it is the number of frequencies.
    Errors: CheckpointError where they follow from no theta, as those of a scaled RoPE, or differ between layers.
    """
    stored = [array for array in arrays if array.key.endswith(_NAME) and array.dtype in _DTYPES]
    found = {_theta(array, head_dim): array for array in stored[:_MAX_ARRAYS]}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise CheckpointError(
            f"{first.file}: {first.key} follows from rope_theta {one:.10g}, {second.key} from {other:.10g}. "
            f"Give --rope-theta."
        )
    return next(iter(found), None)


def _theta(array: StoredArray, head_dim: int) -> float:
    stored = np.frombuffer(array.read_bytes(_MAX_BYTES), _DTYPES[array.dtype])
    if array.dtype == "BF16":  # the upper half of a float32; NumPy has no such dtype
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    frequencies = stored.astype(np.float64)
    relative, absolute = _RELATIVE[array.dtype], _ABSOLUTE.get(array.dtype, 0.0)
    for theta in (QWEN3_THETA, QWEN3_VL_THETA, 1e4, 5e5, *_estimate(frequencies)):
        expected = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # of plain RoPE
        if np.shape(frequencies) == np.shape(expected) and np.allclose(frequencies, expected, relative, absolute):
            return theta
    raise CheckpointError(
        f"{array.file}: {array.key} holds {len(frequencies)} frequencies, expected the {head_dim // 2} that follow "
        f"from a rope_theta. If RoPE is scaled, put the model's config.json beside it; else give --rope-theta."
    )


def _estimate(frequencies: NDArray[np.float64]) -> list[float]:
    """The theta that the last frequency follows from, to six digits. It has the least rounding error."""
    count = len(frequencies)
    if count < 2 or not 1e-12 < frequencies[-1] < 1:
        return []
    return [float(f"{frequencies[-1] ** -(count / (count - 1)):.6g}")]
