"""The arrays of safetensors files: headers now, values later. Knows nothing of models.

A header is checked by the safetensors library (sizes, overlaps, truncation) before anything else looks at it.
"""

import json
import struct
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from encoder.checkpoint.raw_arrays import read_ahead, read_array
from encoder.checkpoint.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError

# 398 tensors need 45 KB; the library's own limit of 100 MB takes seconds and gigabytes to parse.
MAX_HEADER_BYTES = 16 * 2**20
MAX_ARRAYS = 2**14  # a Qwen3-VL of 64 layers in three arrays each, with a diffusion model beside it, has 5,000


@dataclass(frozen=True, slots=True)
class Header:
    """What stands in front of a file's data."""

    arrays: list[StoredArray]
    metadata: dict[str, str]


class SafetensorsWeights:
    """Tensors whose arrays lie in safetensors files."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def read(self, names: Collection[str]) -> Iterator[tuple[StoredTensor, dict[str, mx.array]]]:
        tensors = [self._tensors[name] for name in names]
        files = _OpenFiles(array for tensor in tensors for array in tensor.arrays.values())
        tensors.sort(key=lambda tensor: (tensor.file, tensor.arrays["weight"].offset))  # front to back is fastest
        for tensor, following in zip_longest(tensors, tensors[1:]):
            read_ahead(following.arrays.values() if following else ())
            yield tensor, {role: files.take(array) for role, array in tensor.arrays.items()}


class _OpenFiles:
    """The lazy arrays of each file from the first that is taken to the last; then the file is closed."""

    def __init__(self, arrays: Iterator[StoredArray]) -> None:
        self._left = Counter(array.file for array in arrays)
        self._open: dict[Path, dict[str, mx.array] | None] = {}

    def take(self, array: StoredArray) -> mx.array:
        """An array that nobody else holds. Errors: CheckpointError when it cannot be read."""
        if array.file not in self._open:
            self._open[array.file] = _load_lazily(array.file)
        arrays = self._open[array.file]
        if arrays is not None and array.key not in arrays:
            raise CheckpointError(f"{array.file}: {array.key} is gone: the file was replaced while it was read.")
        taken = read_array(array) if arrays is None else arrays.pop(array.key)
        self._left[array.file] -= 1
        if not self._left[array.file]:
            del self._open[array.file]
        return taken


def read_header(file: Path) -> Header:
    """The header of one file.

    Errors: CheckpointError when the file is missing, is no safetensors file, is cut off, or is inconsistent.
    """
    header, data_offset = _parse_header(file)
    metadata = header.pop("__metadata__", None) or {}
    arrays = []
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays.append(StoredArray(key, file, entry["dtype"], tuple(entry["shape"]), data_offset + begin, end - begin))
    return Header(arrays, {key: value for key, value in metadata.items() if isinstance(value, str)})


def _parse_header(file: Path) -> tuple[dict[str, Any], int]:
    """The validated header of `file`, and the offset in the file at which its data begin."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            [length] = struct.unpack("<Q", prefix) if len(prefix) == 8 else [0]
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: the header claims {length:,} bytes, expected at most {MAX_HEADER_BYTES:,}. "
                    f"Is this a safetensors file? A damaged one must be fetched again."
                )
            with safe_open(file, framework="numpy"):
                pass
            header: dict[str, Any] = json.loads(stream.read(length))
        if len(header) > MAX_ARRAYS:  # each would be looked at, for its name and for the fingerprint
            raise CheckpointError(f"{file}: holds {len(header):,} tensors, expected at most {MAX_ARRAYS:,}.")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors: {error}. A file that is cut off or damaged must be fetched again."
        ) from error
    return header, 8 + length


def _load_lazily(file: Path) -> dict[str, mx.array] | None:
    """All arrays of one file by key, their bytes read when they are evaluated; None where MLX lacks a dtype."""
    try:
        arrays = mx.load(str(file), format="safetensors")
    except (RuntimeError, OSError) as error:
        if "unsupported dtype" in str(error):  # float8_e5m2, float64: one array is enough to fail them all
            return None
        raise CheckpointError(f"{file}: MLX cannot read it: {error}") from error
    assert isinstance(arrays, dict)
    return arrays
