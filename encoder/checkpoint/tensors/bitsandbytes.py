"""bitsandbytes' quantizations: 4-bit numbers that stand for the floats of a table, and 8-bit integers of LLM.int8().

4 bits: blocks of the flattened matrix share a scale, its largest magnitude. The scales themselves may be 8-bit numbers
that stand for the floats of a second table ("double quantization"). What is no tensor is JSON, stored as bytes.
8 bits: `number * SCB / 127`, one SCB for each row.
Source: bitsandbytes 0.50.2, functional.py:QuantState, dequantize_4bit, int8_vectorwise_dequant; nn/modules.py.
"""

from dataclasses import dataclass, replace
from math import isfinite, prod

import mlx.core as mx
import numpy as np

from encoder.checkpoint.tensors.array_checks import FLOAT_DTYPES, Expected, check_arrays
from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.encodings import OnlyDecoded
from encoder.checkpoint.tensors.grouped import Grouped, Groups
from encoder.checkpoint.tensors.json_text import parse_json_object
from encoder.checkpoint.tensors.weights import Arrays, StoredArray, StoredTensor
from encoder.errors import CheckpointError

_STATES = {f"weight.quant_state.bitsandbytes__{name}": f"bitsandbytes {name}" for name in ("nf4", "fp4")}
_TABLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MAX_STATE_BYTES = 4096
_BLOCK_SIZES = tuple(2**exponent for exponent in range(5, 13))


@dataclass(frozen=True, slots=True)
class Blocks4Bit(OnlyDecoded):
    """Two numbers in a byte, the first in the upper half. Blocks run on over the ends of rows."""

    label: str
    shape: tuple[int, int]
    block_size: int
    nested_block_size: int
    nested_offset: float
    quantized: bool = True

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        numbers = _look_up_pairs(arrays["quant_map"], arrays["weight"])[: prod(self.shape)]
        weight = _times_blocks(numbers, self._scales(arrays), self.block_size)
        return weight.reshape(self.shape).astype(dtype)

    def _scales(self, arrays: Arrays) -> mx.array:
        if "nested_absmax" not in arrays:
            return arrays["absmax"]
        nested = arrays["nested_quant_map"][arrays["absmax"]]
        return _times_blocks(nested, arrays["nested_absmax"], self.nested_block_size) + self.nested_offset


def bitsandbytes_4bit(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for NF4 and FP4. Errors: CheckpointError for arrays that do not fit what the state says."""
    name = next((name for name in parts if name in _STATES), None)
    if name is None or "weight" not in parts:
        return None
    label, note = _STATES[name], parts.pop(name)
    arrays = {role.removeprefix("weight."): array for role, array in _take_tables(parts).items()}
    # The bytes may be declared as floats, whose dtype sharded training wants to be that of all parameters.
    arrays["weight"] = replace(arrays["weight"], dtype="U8", shape=(arrays["weight"].nbytes,))
    encoding = _encoding(label, note, nested="nested_absmax" in arrays)
    numbers = prod(encoding.shape)
    blocks = -(-numbers // encoding.block_size)
    expected: Expected = {
        "weight": (("U8",), (-(-numbers // 2),)),
        "quant_map": (("F32",), (16,)),
        "absmax": (("F32",), (blocks,)),
    }
    if "nested_absmax" in arrays:
        expected |= {
            "absmax": (("U8",), (blocks,)),
            "nested_absmax": (("F32",), (-(-blocks // encoding.nested_block_size),)),
            "nested_quant_map": (("F32",), (256,)),
        }
    check_arrays(label, arrays, expected)
    return StoredTensor(f"{path}.weight", encoding.shape, encoding, arrays)


def llm_int8(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for LLM.int8(). Errors: CheckpointError for numbers in the order of a GPU's kernel."""
    if "SCB" not in parts or "weight" not in parts or len(parts["weight"].shape) != 2:
        return None
    label = "bitsandbytes int8"
    arrays = take(parts, "weight", "SCB")
    for name in ("weight_format", "weight.weight_format"):
        if name in parts and any(parts[name].read_bytes(8)):
            raise CheckpointError(
                f"{parts[name].file.name}: {parts[name].key} says that the weight is in the order of a GPU's kernel, "
                f"expected 0, rows. Load it with a newer bitsandbytes and save it again, or take the original."
            )
        parts.pop(name, None)
    shape = arrays["weight"].shape
    check_arrays(label, arrays, {"weight": (("I8",), shape), "SCB": (FLOAT_DTYPES, shape[:1])})
    return StoredTensor(f"{path}.weight", shape, Grouped(label, _rows_of_int8), arrays)


def _rows_of_int8(arrays: Arrays) -> Groups:
    return Groups(arrays["weight"], arrays["SCB"].astype(mx.float32)[:, None] / 127)


def _take_tables(parts: Parts) -> Parts:
    return take(parts, "weight", *(f"weight.{name}" for name in _TABLES))


def _look_up_pairs(table: mx.array, packed: mx.array) -> mx.array:
    """The floats of both numbers in each byte. NumPy does in one step what takes MLX several times as long on a CPU."""
    codes, floats = np.arange(256), np.asarray(table)
    pairs = np.stack([floats[codes >> 4], floats[codes & 15]], axis=-1)  # of each byte
    return mx.array(np.take(pairs, np.asarray(packed), axis=0)).reshape(-1)


def _times_blocks(values: mx.array, scales: mx.array, block_size: int) -> mx.array:
    """Each value times the scale of its block. The last block may be shorter."""
    missing = scales.size * block_size - values.size
    blocks = mx.pad(values, (0, missing)).reshape(-1, block_size)
    return (blocks * scales[:, None]).reshape(-1)[: values.size]


def _encoding(label: str, note: StoredArray, *, nested: bool) -> Blocks4Bit:
    state = parse_json_object(note.read_bytes(_MAX_STATE_BYTES), f"{note.file.name}: {note.key}")
    if not nested:
        state |= {"nested_blocksize": _BLOCK_SIZES[0], "nested_offset": 0.0}
    shape, offset = state.get("shape"), state.get("nested_offset")
    block_size, nested_block_size = state.get("blocksize"), state.get("nested_blocksize")
    if (
        not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape))
        or not (type(block_size) is int and block_size in _BLOCK_SIZES)
        or not (type(nested_block_size) is int and nested_block_size in _BLOCK_SIZES)
        or not (isinstance(offset, float) and isfinite(offset))
    ):
        raise CheckpointError(
            f"{note.file.name}: {note.key} is {state!r:.200}, expected the shape of a matrix, and blocks of "
            f"{_BLOCK_SIZES[0]} to {_BLOCK_SIZES[-1]} numbers."
        )
    return Blocks4Bit(label, (shape[0], shape[1]), block_size, nested_block_size, offset)
