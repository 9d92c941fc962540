"""Stored weights as the loader sees them, whatever file format holds them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from encoder.checkpoint.tensors.quantization import Quantization
from encoder.regular_file import open_file

Arrays = Mapping[str, mx.array]  # the arrays of one tensor, by role: "weight", "scales", ...

_SAMPLE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array in a file, as the file's header describes it.

    Attributes:
        key: name in the file, e.g. `model.layers.3.self_attn.q_norm.weight`.
        file: path of the file.
        dtype: as safetensors spells it, e.g. "BF16". Types that only GGUF has keep their names there, e.g. "Q4_K".
        shape: in elements.
        offset: of the first byte, from the start of the file. No alignment is assumed.
        nbytes: size in the file.
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
        with open_file(self.file) as file:
            file.seek(self.offset)
            head = file.read(length)
            file.seek(self.offset + self.nbytes - length)
            return head + file.read(length)

    def read_bytes(self, limit: int) -> bytes:
        """All bytes of a small array, at most `limit`."""
        with open_file(self.file) as file:
            file.seek(self.offset)
            return file.read(min(limit, self.nbytes))


class Encoding(Protocol):
    """How a tensor's numbers are stored, and how to get them back."""

    @property
    def label(self) -> str:
        """Name for people, and part of the fingerprint: `bfloat16`, `mxfp4`, `Q4_K`."""

    @property
    def quantized(self) -> bool:
        """Whether the numbers are stored in fewer bits than floats of 16 bits."""

    @property
    def mlx_quantization(self) -> Quantization | None:
        """The quantization of MLX that `pack` gives, without loss; None where the tensor must be decoded."""

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        """The tensor as floats, unevaluated. Computed in float32 and rounded once, to `dtype`."""

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        """`weight`, `scales` and perhaps `biases` in MLX's layout, unevaluated.

        Called only where `mlx_quantization` is not None.
        """


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter of the model, as it is stored.

    Attributes:
        name: of the model's parameter, e.g. `layers.3.self_attn.q_norm.weight`.
        shape: of the parameter; the stored arrays may have other shapes.
        encoding: how to decode the arrays.
        arrays: the arrays that the parameter is made of, by role. The role "weight" is always present.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    arrays: Mapping[str, StoredArray]

    @property
    def key(self) -> str:
        """Name of the weight array in its file."""
        return self.arrays["weight"].key

    @property
    def file(self) -> Path:
        """The file that holds the weight array."""
        return self.arrays["weight"].file

    @property
    def nbytes(self) -> int:
        """Size in the file, of all its arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one checkpoint, by the names of the model's parameters.

    Attributes:
        tensors: those of the encoder. A file may hold others, e.g. a vision tower or a language model head.
        check_file: called once with each file, before an array in it is read. Raises CheckpointError.
    """

    tensors: Mapping[str, StoredTensor]
    check_file: Callable[[Path], None] = lambda _file: None
