"""The header of a GGUF file: its metadata, and where its tensors are.

The gguf package reads headers too. But it takes 13 s for Qwen3's 300,000 tokens and merges, and it trusts every count
in the file; see docs/decisions/0004-read-checkpoints-where-they-lie.md. The package gives the sizes of the types.
Source: ggml, docs/gguf.md.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from encoder.checkpoint.files.lookalikes import explain_lookalike
from encoder.checkpoint.files.unreadable import unreadable
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.regular_file import open_file

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_ENTRIES = 2**14  # of keys, and of tensors
_MAX_ELEMENTS = 2**21  # in all arrays together; a vocabulary and its merges have 2**19
_MAX_TEXT_BYTES = 2**25  # of all texts together; Qwen3's tokens and merges have 4 MB
_MAX_RANK = 4


class _Damaged(Exception):
    """The header contradicts itself; the message says how."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata by key, and the arrays in the order of the file."""

    metadata: dict[str, Any]
    arrays: list[StoredArray]


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of one file.

    Errors: CheckpointError when the file is no GGUF of version 2 or 3, is cut off, or contradicts itself.
    """
    try:
        if (lookalike := explain_lookalike(file)) is not None:
            raise CheckpointError(f"{file}: {lookalike}")
        with open_file(file) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(file, data).header()
    except OSError as error:
        raise unreadable(file, error) from error
    except (_Damaged, struct.error, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read as GGUF: {error}. A file that is cut off or damaged must be fetched again."
        ) from error


class _Parser:
    """Reads value after value. Compares every count with the size of the file before it uses the count."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file, self._data, self._position = file, data, 0
        self._elements_left, self._text_bytes_left = _MAX_ELEMENTS, _MAX_TEXT_BYTES

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise _Damaged("it does not begin with GGUF")
        self._position = 4
        version, tensors, entries = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in _VERSIONS:
            raise _Damaged(f"version is {version}, expected 2 or 3 in little-endian order")
        if max(tensors, entries) > _MAX_ENTRIES:
            raise _Damaged(f"it claims {tensors:,} tensors and {entries:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text()
            if key in metadata:
                raise _Damaged(f"it has the key {key} twice")
            metadata[key] = self._value(self._scalar("I"))
        return GgufHeader(metadata, self._arrays(tensors, metadata))

    def _arrays(self, count: int, metadata: dict[str, Any]) -> list[StoredArray]:
        infos = [self._info() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
            raise _Damaged(f"general.alignment is {shown(alignment)}")
        start = -(-self._position // alignment) * alignment
        arrays = [StoredArray(key, self._file, kind, shape, start + at, size) for key, kind, shape, at, size in infos]
        end = start
        for array in sorted(arrays, key=lambda array: array.offset):
            if array.offset < end:
                raise _Damaged(f"{array.key} overlaps the tensor before it")
            end = array.offset + array.nbytes
            if end > len(self._data):
                raise _Damaged(f"{array.key} ends at byte {end:,}, the file at {len(self._data):,}")
        if len({array.key for array in arrays}) != len(arrays):
            raise _Damaged("two tensors have one name")
        return arrays

    def _info(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Of one tensor: key, dtype, shape, offset from the start of the data, and size in bytes."""
        key, rank = self._text(), self._scalar("I")
        if rank > _MAX_RANK:
            raise _Damaged(f"{key} has {rank} dims")
        shape = tuple(reversed([self._scalar("Q") for _ in range(rank)]))  # GGUF has the fastest axis first
        kind, block, block_bytes = _type(self._scalar("I"), key)
        if shape and shape[-1] % block:
            raise _Damaged(f"{key} has rows of {shape[-1]:,} numbers, expected whole blocks of {block}")
        return key, kind, shape, self._scalar("Q"), prod(shape) // block * block_bytes

    def _value(self, kind: int) -> Any:
        """A value of the metadata: a number, a text, or an array of either."""
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise _Damaged(f"a value is of type {kind}")
        kind, count = self._scalar("I"), self._scalar("Q")
        smallest = 8 if kind == _STRING else struct.calcsize("<" + _SCALARS.get(kind, "?"))
        self._elements_left -= count
        if self._elements_left < 0 or count * smallest > len(self._data) - self._position:
            raise _Damaged(f"an array claims {count:,} elements")
        if kind == _STRING:
            return self._texts(count)
        if kind not in _SCALARS:
            raise _Damaged(f"an array is of type {kind}")
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        self._position += layout.size
        return layout.unpack_from(self._data, self._position - layout.size)

    def _texts(self, count: int) -> list[str]:
        """The same as calling `_text` `count` times, but takes 0.1 s for a vocabulary."""
        data, position, end = self._data, self._position, len(self._data)
        end = min(end, position + 8 * count + self._text_bytes_left)
        length_at: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            [length] = length_at(data, position)
            position += 8 + length
            if position > end:
                raise _Damaged(f"a text of {length:,} bytes runs over its end")
            texts.append(data[position - length : position].decode())
        self._text_bytes_left -= position - self._position - 8 * count
        self._position = position
        return texts

    def _scalar(self, letter: str) -> Any:
        """A number, by its letter in the module struct."""
        [value] = struct.unpack_from("<" + letter, self._data, self._position)
        self._position += struct.calcsize("<" + letter)
        return value

    def _text(self) -> str:
        length = self._scalar("Q")
        if length > min(self._text_bytes_left, len(self._data) - self._position):
            raise _Damaged(f"a text claims {length:,} bytes")
        self._text_bytes_left -= length
        self._position += length
        return self._data[self._position - length : self._position].decode()


def _type(number: int, key: str) -> tuple[str, int, int]:
    """Name of a type, numbers in a block, and bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # takes 0.2 s to import

    try:
        kind = GGMLQuantizationType(number)
        return (kind.name, *GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError):
        raise _Damaged(f"{key} is of type {number}, which the installed gguf package does not know") from None
