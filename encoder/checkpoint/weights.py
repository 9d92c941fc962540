"""What the loader needs to know of stored tensors, whatever file format holds them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file, seen from the file's header.

    Attributes:
        name: of the model's parameter, e.g. `layers.3.self_attn.q_norm.weight`.
        key: in the file, e.g. `model.layers.3.self_attn.q_norm.weight`.
        file: that holds it.
        dtype: as safetensors spells it, e.g. "BF16".
        shape: in elements.
        offset: of its first byte in the file.
        nbytes: that it occupies there.
    """

    name: str
    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Weights(Protocol):
    """The tensors of one checkpoint, by the names of the model's parameters."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors that belong to the encoder. Tensors that it never needs are not among them."""

    def sample(self, tensor: StoredTensor) -> bytes:
        """A few KiB of the tensor's bytes, always the same ones: enough to tell two checkpoints apart."""

    def read(self) -> Iterator[tuple[StoredTensor, mx.array]]:
        """Every tensor once, file after file, as an MLX array that is not evaluated yet.

        Evaluate an array on the calling thread, and drop it before asking for the next one: then no more than one
        stored tensor is in memory at a time.
        """
