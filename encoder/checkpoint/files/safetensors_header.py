"""The headers of safetensors files. Knows nothing of models.

The safetensors library checks a header (sizes, overlaps, truncation) before anything else reads it.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from encoder.checkpoint.files.lookalikes import explain_lookalike
from encoder.checkpoint.files.unreadable import unreadable
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.regular_file import open_file

# 398 tensors need 45 KB. A header of the library's limit, 100 MB, takes seconds and gigabytes to parse.
MAX_HEADER_BYTES = 16 * 2**20
MAX_ARRAYS = 2**14  # a Qwen3-VL of 64 layers in three arrays each, with a diffusion model beside it, has 5,000


@dataclass(frozen=True, slots=True)
class Header:
    """The arrays of a file, and its metadata by key."""

    arrays: list[StoredArray]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """The header of one file.

    Errors: CheckpointError when the file is missing, is no safetensors file, is cut off, or contradicts itself.
    """
    header, data_offset = _parse_header(file)
    metadata = header.pop("__metadata__", None) or {}
    arrays = []
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        arrays.append(StoredArray(key, file, entry["dtype"], tuple(entry["shape"]), data_offset + begin, end - begin))
    return Header(arrays, {key: value for key, value in metadata.items() if isinstance(value, str)})


def _parse_header(file: Path) -> tuple[dict[str, Any], int]:
    """The checked header of `file`, and the offset at which the data begin."""
    try:
        if (lookalike := explain_lookalike(file)) is not None:
            raise CheckpointError(f"{file}: {lookalike}")
        with open_file(file) as stream:
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
        if len(header) > MAX_ARRAYS:  # every array costs time: its name is parsed, and the fingerprint reads its bytes
            raise CheckpointError(f"{file}: holds {len(header):,} tensors, expected at most {MAX_ARRAYS:,}.")
    except OSError as error:
        raise unreadable(file, error) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as safetensors: {error}. A file that is cut off or damaged must be fetched again."
        ) from error
    return header, 8 + length
