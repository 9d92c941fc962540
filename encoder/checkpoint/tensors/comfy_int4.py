"""ComfyUI's quantizations to 4 and 6 bits: integers, or places in a codebook, packed into bytes.

convrot_w4a4      signed numbers, and a scale for each row
asym_w4a8_int8    codes of 4 or 6 bits. A codebook, or a shift to signed numbers, gives levels; times the scale of their
                  group, rounded to 8 bits, they are int8 numbers with a scale for each row
awq_w4a16         numbers from 0 to 15, and a scale and a zero for each group: (number - 8) * scale + zero

Of two numbers in a byte, the first is in the lower half. The first two are rotated, always.
Source: comfy-kitchen 0.2.40, backends/eager/convrot_w4a4.py, w4a8_int8.py, awq.py, tensor/w4a8_packed.py.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from encoder.checkpoint.tensors.assemble import Parts, take
from encoder.checkpoint.tensors.comfy_note import Note
from encoder.checkpoint.tensors.encodings import FLOATS, OnlyDecoded
from encoder.checkpoint.tensors.grouped import Grouped, Groups, unpack_bits
from encoder.checkpoint.tensors.transformed import ROW_SCALE
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class SignedInt4(OnlyDecoded):
    """Numbers from -8 to 7. What scales them is another encoding's."""

    label: str = "int4"
    quantized: bool = True

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        codes = unpack_bits(arrays["weight"], 4)
        return ((codes ^ 8).astype(mx.float32) - 8).astype(dtype)  # two's complement


@dataclass(frozen=True, slots=True)
class GroupedCodes(OnlyDecoded):
    """Integers from -127 to 127, decoded from codes of 4 or 6 bits and a relative scale for each group.

    With a `correction`, a number added in each group, they are already times the scale of the row, `channel`.

    Attributes:
        bits: of a code. With 6, the lower four bits of all codes of a row come first, and then their upper two.
        group_size: numbers that share a relative scale.
    """

    bits: Literal[4, 6]
    group_size: int
    quantized: bool = True

    @property
    def label(self) -> str:
        return f"w{self.bits}a8 in groups of {self.group_size}"

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        relative = arrays["relative"]
        if relative.dtype == mx.uint8:
            relative = mx.from_fp8(relative, dtype=mx.float32)
        levels = self._levels(arrays)
        rows, columns = levels.shape
        groups = levels.reshape(rows, -1, self.group_size) * relative.astype(mx.float32)[..., None]
        numbers = mx.clip(mx.round(groups), -127, 127)
        if "correction" in arrays:
            channel = arrays["channel"].astype(mx.float32).reshape(-1, 1, 1)
            numbers = numbers * channel + arrays["correction"].astype(mx.float32).T[..., None]
        return numbers.reshape(rows, columns).astype(dtype)

    def _levels(self, arrays: Arrays) -> mx.array:
        """The level of each code, (rows, columns) float32."""
        stored = arrays["weight"]
        if self.bits == 4:
            codes = unpack_bits(stored, 4)
        else:
            low = stored.shape[1] * 2 // 3  # bytes with the lower four bits of two codes; the others have four twos
            codes = unpack_bits(stored[:, :low], 4) | (unpack_bits(stored[:, low:], 2) << 4)
        if "codebook" in arrays:
            return mx.take(arrays["codebook"].astype(mx.float32), codes)
        return codes.astype(mx.float32) - float(1 << (self.bits - 1))


def convrot_w4a4(path: str, parts: Parts, note: Note) -> StoredTensor:
    """Reader of convrot_w4a4. Errors: CheckpointError for arrays that do not fit each other."""
    arrays = take(parts, "weight", "weight_scale")
    rows, columns = _shape(arrays["weight"], note, 4)
    scale = _array(arrays, note, "weight_scale", FLOATS, (rows,), (rows, 1))
    return StoredTensor(f"{path}.weight", (rows, columns), SignedInt4(), {"weight": arrays["weight"], ROW_SCALE: scale})


def w4a8(path: str, parts: Parts, note: Note) -> StoredTensor:
    """Reader of asym_w4a8_int8. Errors: as of `convrot_w4a4`."""
    arrays = take(parts, "weight", "weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction")
    size = note.count("group_size", 16)
    weight, bits = arrays["weight"], _bits(arrays, size)
    rows, columns = _shape(weight, note, bits, size)
    groups = columns // size
    roles = {"weight": weight}
    roles["relative"] = _array(arrays, note, "weight_s_rel", (*FLOATS, "F8_E4M3", "U8"), (rows, groups))
    channel = _array(arrays, note, "weight_s_channel", FLOATS, (rows,), (rows, 1))
    if "weight_codebook" in arrays:
        roles["codebook"] = _array(arrays, note, "weight_codebook", FLOATS, (2**bits,))
    if "weight_correction" in arrays:
        roles["correction"] = _array(arrays, note, "weight_correction", FLOATS, (groups, rows))
    roles["channel" if "correction" in roles else ROW_SCALE] = channel
    return StoredTensor(f"{path}.weight", (rows, columns), GroupedCodes(bits, size), roles)


def awq_w4a16(path: str, parts: Parts, note: Note) -> StoredTensor:
    """Reader of awq_w4a16. Errors: as of `convrot_w4a4`."""
    arrays = take(parts, "weight", "weight_scale", "weight_zeros")
    size = note.count("group_size", 64)
    rows, columns = _shape(arrays["weight"], note, 4, size)
    scales, zeros = (
        _array(arrays, note, name, FLOATS, (columns // size, rows)) for name in ("weight_scale", "weight_zeros")
    )
    roles = {"weight": arrays["weight"], "scales": scales, "zeros": zeros}
    encoding = Grouped(f"awq_w4a16 in groups of {size}", _awq_groups)
    return StoredTensor(f"{path}.weight", (rows, columns), encoding, roles)


def _awq_groups(arrays: Arrays) -> Groups:
    """Scales and zeros are stored transposed, (groups, rows)."""
    numbers = unpack_bits(arrays["weight"], 4)
    return Groups(numbers, arrays["scales"].T, zeros=mx.array([[8]]), offsets=arrays["zeros"].T)


def _bits(arrays: Parts, group_size: int) -> Literal[4, 6]:
    """Bits of a code: the columns follow from the scales of the groups, and the bits from the bytes of a row."""
    weight, relative = arrays["weight"], arrays.get("weight_s_rel")
    columns = relative.shape[-1] * group_size if relative is not None and relative.shape else 0
    return 6 if columns and weight.shape[-1:] == (columns * 6 // 8,) else 4


def _shape(weight: StoredArray, note: Note, bits: int, group_size: int = 2) -> tuple[int, int]:
    """Rows and columns of the numbers in a weight's bytes."""
    shape = (weight.shape[0], weight.shape[1] * 8 // bits) if len(weight.shape) == 2 else (0, 0)
    whole = all(shape) and shape[1] % group_size == 0 and shape[1] * bits == weight.shape[1] * 8
    if weight.dtype not in ("I8", "U8") or not whole:
        raise CheckpointError(
            f"{note.where} is {weight.dtype} {weight.shape}, expected bytes of {note.format} in groups of {group_size}."
        )
    return shape


def _array(arrays: Parts, note: Note, name: str, dtypes: Collection[str], *shapes: tuple[int, ...]) -> StoredArray:
    """The array of this name, of one of these dtypes and shapes."""
    array = arrays.get(name)
    if array is None or array.dtype not in dtypes or array.shape not in shapes:
        found = "nothing" if array is None else f"{array.dtype} {array.shape}"
        raise CheckpointError(
            f"{note.where} has as {name} {found}, expected {' or '.join(dtypes)} of shape "
            f"{' or '.join(map(str, shapes))} for {note.format}."
        )
    return array
