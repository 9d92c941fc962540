"""The tensors of one or several safetensors files: headers now, values later. Knows nothing of models.

A header is checked by the safetensors library (sizes, overlaps, truncation) before anything else looks at it.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from encoder.checkpoint.keys import parameter_name
from encoder.checkpoint.weights import StoredTensor
from encoder.errors import CheckpointError

# 398 tensors need 45 KB; the library's own limit of 100 MB takes seconds and gigabytes to parse.
MAX_HEADER_BYTES = 16 * 2**20
_SAMPLE_BYTES = 1024


class SafetensorsWeights:
    """The encoder's tensors in a set of safetensors files."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the headers of `files`.

        Errors: CheckpointError for a file that is missing or damaged, or two tensors for one parameter.
        """
        self._tensors: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in read_header(file):
                first = self._tensors.setdefault(tensor.name, tensor)
                if first is not tensor:
                    raise CheckpointError(
                        f"{file.name}: {tensor.key} is the parameter {tensor.name}, "
                        f"which {first.file.name} already has as {first.key}. Remove one of the two."
                    )

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return self._tensors

    def sample(self, tensor: StoredTensor) -> bytes:
        """The first and the last KiB."""
        length = min(_SAMPLE_BYTES, tensor.nbytes)
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            head = file.read(length)
            file.seek(tensor.offset + tensor.nbytes - length)
            return head + file.read(length)

    def read(self) -> Iterator[tuple[StoredTensor, mx.array]]:
        by_file: dict[Path, list[StoredTensor]] = {}
        for tensor in self._tensors.values():
            by_file.setdefault(tensor.file, []).append(tensor)
        for file, tensors in by_file.items():
            arrays = _load_lazily(file)
            for tensor in sorted(tensors, key=lambda tensor: tensor.offset):  # front to back is fastest
                yield tensor, arrays.pop(tensor.key)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file that belong to the encoder.

    Errors: CheckpointError when the file is missing, is no safetensors file, is cut off, or is inconsistent.
    """
    header, data_offset = _parse_header(file)
    tensors = []
    for key, entry in header.items():
        name = None if key == "__metadata__" else parameter_name(key)
        if name is not None:
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors.append(StoredTensor(name, key, file, entry["dtype"], shape, data_offset + begin, end - begin))
    return tensors


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
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors: {error}. A file that is cut off or damaged must be fetched again."
        ) from error
    return header, 8 + length


def _load_lazily(file: Path) -> dict[str, mx.array]:
    """All arrays of one file by key; their bytes are read when they are evaluated."""
    try:
        arrays = mx.load(str(file), format="safetensors")
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{file}: MLX cannot read it: {error}") from error
    assert isinstance(arrays, dict)
    return arrays
