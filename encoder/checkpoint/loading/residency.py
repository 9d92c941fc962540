"""Decides which form each stored tensor takes in memory: floats, or quantized as MLX's kernels compute with it."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from encoder.checkpoint.loading.quantized_kernels import has_kernel
from encoder.checkpoint.tensors.encodings import Plain
from encoder.checkpoint.tensors.lora import Merged
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import Arrays, StoredTensor

EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Resident:
    """A tensor, and the form that it takes in memory.

    Attributes:
        stored: the tensor in the file.
        dtype: of floats, and of scales and biases.
        quantization: in memory; None for floats.
    """

    stored: StoredTensor
    dtype: mx.Dtype
    quantization: Quantization | None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in memory."""
        numbers = prod(self.stored.shape)
        if self.quantization is None:
            return numbers * self.dtype.size
        return self.quantization.nbytes(numbers, self.dtype.size)

    @property
    def bytes_while_read(self) -> int:
        """Bytes that are in memory beside the result while the tensor is read: as stored, and what LoRAs add to."""
        merged = 2 * 4 * prod(self.stored.shape) if isinstance(self.stored.encoding, Merged) else 0  # in float32
        return self.stored.nbytes + merged

    @property
    def is_exact(self) -> bool:
        """Whether the tensor is floats in the file, and `dtype` holds each of them without rounding."""
        return (
            isinstance(self.stored.encoding, Plain)
            and self.quantization is None
            and self.dtype in (mx.float32, getattr(mx, self.stored.encoding.label))
        )

    def parameters(self, arrays: Arrays) -> dict[str, mx.array]:
        """The parameters that the tensor becomes, by name, not evaluated."""
        encoding, name = self.stored.encoding, self.stored.name
        if self.quantization is None:
            return {name: encoding.decode(arrays, self.dtype)}
        if self.quantization == encoding.mlx_quantization:
            packed = encoding.pack(arrays)
        else:
            floats = encoding.decode(arrays, self.dtype)
            quantization = self.quantization
            parts = mx.quantize(
                floats, group_size=quantization.group_size, bits=quantization.bits, mode=quantization.mode
            )
            packed = dict(zip(("weight", "scales", "biases"), parts, strict=False))
        if self.quantization.has_biases:
            packed |= {role: packed[role].astype(self.dtype) for role in ("scales", "biases")}
        path = name.removesuffix("weight")
        return {path + role: array for role, array in packed.items()}


def new_quantization(quantize: str) -> Quantization | None:
    """The quantization that `quantize` of ModelOptions asks for; None where it quantizes nothing anew.

    Errors: CheckpointError for a value that is not allowed.
    """
    return None if quantize in ("auto", "keep", "none") else Quantization.parse(quantize)


def plan_residents(
    tensors: Collection[StoredTensor],
    dtype: mx.Dtype,
    quantize: Quantization | None,
    *,
    keep: bool,
    keep_bfloat16: bool = False,
) -> dict[str, Resident]:
    """The form that each tensor takes in memory, by name.

    Args:
        tensors: the tensors to load.
        dtype: to compute in.
        quantize: the quantization that matrices are converted to; None converts none.
        keep: whether stored quantizations stay, where MLX has a kernel for them.
        keep_bfloat16: whether matrices stay bfloat16 when all of them are stored in it and none is quantized.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    if keep_bfloat16 and quantize is None and all(matrix.encoding == Plain("bfloat16") for matrix in matrices):
        return {t.name: Resident(t, mx.bfloat16 if len(t.shape) == 2 else dtype, None) for t in tensors}
    return {tensor.name: Resident(tensor, dtype, _choose(tensor, dtype, quantize, keep)) for tensor in tensors}


def _choose(tensor: StoredTensor, dtype: mx.Dtype, quantize: Quantization | None, keep: bool) -> Quantization | None:
    stored = tensor.encoding.mlx_quantization if keep else None
    chosen = quantize if quantize is not None else stored
    if chosen is None or not tensor.name.endswith(".weight") or not chosen.fits(tensor.shape):
        return None
    # In the modes without biases nn.QuantizedEmbedding returns bfloat16, whatever dtype the other layers compute in.
    embedding = tensor.name == EMBEDDING
    if embedding and not chosen.has_biases and dtype != mx.bfloat16:
        return None
    return chosen if has_kernel(chosen, dtype, tensor.shape, lookup=embedding) else None


def quantization_label(residents: Mapping[str, Resident]) -> str | None:
    """Every quantization in memory, that of most bytes first; None where all tensors are floats."""
    nbytes: Counter[str] = Counter()
    for resident in residents.values():
        if resident.quantization is not None:
            nbytes[resident.quantization.label] += resident.nbytes
    return ", ".join(name for name, _ in nbytes.most_common()) or None
