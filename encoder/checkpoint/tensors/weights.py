"""What the loader needs to know of stored weights, whatever file format holds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from encoder.checkpoint.tensors.quantization import Quantization

Arrays = Mapping[str, mx.array]  # of one tensor, by role: "weight", "scales", ...

_SAMPLE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array in a file, seen from the file's header.

    Attributes:
        key: in the file, e.g. `model.layers.3.self_attn.q_norm.weight`.
        file: that holds it.
        dtype: as the file spells it, e.g. "BF16" in safetensors.
        shape: in elements.
        offset: of its first byte in the file.
        nbytes: that it occupies there.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def sample(self) -> bytes:
        """The first and the last KiB: enough to tell two checkpoints apart."""
        length = min(_SAMPLE_BYTES, self.nbytes)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            head = file.read(length)
            file.seek(self.offset + self.nbytes - length)
            return head + file.read(length)

    def read_bytes(self, limit: int) -> bytes:
        """All bytes of a small array, at most `limit`."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(min(limit, self.nbytes))


class Encoding(Protocol):
    """How a tensor's numbers are stored, and how to get them back."""

    @property
    def label(self) -> str:
        """For people, and part of the fingerprint: `bfloat16`, `mxfp4`, `Q4_K`."""

    @property
    def quantized(self) -> bool:
        """Whether the numbers are stored as less than floats."""

    @property
    def kept(self) -> Quantization | None:
        """What MLX can compute with after `pack`, without loss; None means that it must be decoded."""

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        """The tensor as floats, not evaluated; rounded once, to `dtype`."""

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        """`weight`, `scales` and perhaps `biases` as MLX's kernels take them, not evaluated; only where `kept`."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter of the model, as it is stored.

    Attributes:
        name: of the model's parameter, e.g. `layers.3.self_attn.q_norm.weight`.
        shape: of the parameter, whatever the shape of what is stored.
        encoding: how to get the parameter from the arrays.
        arrays: by role; "weight" is the one that is always there.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    arrays: Mapping[str, StoredArray]

    @property
    def key(self) -> str:
        """In the file, of the numbers themselves."""
        return self.arrays["weight"].key

    @property
    def file(self) -> Path:
        """That holds the numbers themselves."""
        return self.arrays["weight"].file

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one checkpoint, by the names of the model's parameters.

    Attributes:
        tensors: all that belong to the encoder. Tensors that it never needs are not among them.
        check_file: called with each file before an array in it is read; raises CheckpointError.
    """

    tensors: Mapping[str, StoredTensor]
    check_file: Callable[[Path], None] = lambda file: None
