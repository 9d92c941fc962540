"""ComfyUI's nvfp4 and mxfp8: blocks of columns, each with an 8-bit scale.

Block scales are in the order in which NVIDIA's tensor cores read them: tiles of 128 rows and 4 columns.
Source: comfy-kitchen 7d86acf, float_utils.py:to_blocked, backends/eager/quantization.py.
"""

from dataclasses import dataclass

import mlx.core as mx

from encoder.checkpoint.tensors.assemble import Parts, take
from encoder.checkpoint.tensors.comfy_note import Note
from encoder.checkpoint.tensors.encodings import FLOATS, dequantize
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.weights import Arrays, StoredTensor
from encoder.errors import CheckpointError

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_SCALES = ("U8", "F8_E4M3", "F8_E8M0")  # of 8 bits, as their own dtype or as bytes


@dataclass(frozen=True, slots=True)
class ComfyBlocks:
    """Blocks along each row, each with an 8-bit scale. nvfp4 also has a float32 scale for the whole tensor."""

    quantization: Quantization
    shape: tuple[int, ...]
    quantized: bool = True

    @property
    def label(self) -> str:
        return self.quantization.label

    @property
    def mlx_quantization(self) -> Quantization | None:
        return self.quantization if self.quantization.mode == "mxfp8" else None

    def decode(self, arrays: Arrays, dtype: mx.Dtype) -> mx.array:
        packed = self.pack(arrays)
        if "global_scale" in arrays:
            packed["global_scale"] = arrays["global_scale"]
        return dequantize(packed, self.quantization, dtype)

    def pack(self, arrays: Arrays) -> dict[str, mx.array]:
        data = arrays["weight"]
        if self.quantization.mode == "nvfp4":
            data = (data << 4) | (data >> 4)  # MLX keeps the first of two numbers in the lower half of a byte
        rows, columns = self.shape
        scales = untile(arrays["scales"], rows, columns // self.quantization.group_size)
        return {"weight": data.view(mx.uint32), "scales": scales}


def untile(scales: mx.array, rows: int, columns: int) -> mx.array:
    """Scales in row-major order, (rows, columns), from tiles of 128 x 4, the last of which are padded."""
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    tiles = scales.reshape(down, across, 32, 4, _TILE_COLUMNS)  # row 32 * i + j of a tile is at [j, i]
    ordered = tiles.transpose(0, 3, 2, 1, 4).reshape(down * _TILE_ROWS, across * _TILE_COLUMNS)
    return ordered[:rows, :columns]


def tiled_nbytes(rows: int, columns: int) -> int:
    """Bytes that 8-bit scales of this shape take in tiles."""
    return -(-rows // _TILE_ROWS) * _TILE_ROWS * -(-columns // _TILE_COLUMNS) * _TILE_COLUMNS


def nvfp4(path: str, parts: Parts, note: Note) -> StoredTensor:
    """Reader of nvfp4. Errors: CheckpointError for arrays that do not fit each other."""
    tensor = _blocks(path, parts, note, Quantization("nvfp4", 4, 16))
    whole = take(parts, "weight_scale_2").get("weight_scale_2")
    if whole is None or whole.dtype not in FLOATS or whole.shape not in ((), (1,)):
        found = "none" if whole is None else f"{whole.dtype} {whole.shape}"
        raise CheckpointError(f"{note.where} has as weight_scale_2 {found}, expected one float for nvfp4.")
    return StoredTensor(tensor.name, tensor.shape, tensor.encoding, {**tensor.arrays, "global_scale": whole})


def mxfp8(path: str, parts: Parts, note: Note) -> StoredTensor:
    """Reader of mxfp8. Errors: as of `nvfp4`."""
    take(parts, "weight_scalar")  # of hybrid_mxfp8: one scale in place of all, for devices without mxfp8
    if "weight_scale_2" in parts:
        raise CheckpointError(f"{note.where}: weight_scale_2 belongs to nvfp4, and to no other format.")
    return _blocks(path, parts, note, Quantization("mxfp8", 8, 32))


def _blocks(path: str, parts: Parts, note: Note, quantization: Quantization) -> StoredTensor:
    arrays = take(parts, "weight", "weight_scale")
    weight, scales = arrays["weight"], arrays.get("weight_scale")
    per_byte = 8 // quantization.bits
    if len(weight.shape) != 2 or weight.dtype not in ("U8", "F8_E4M3") or weight.shape[1] * per_byte % 64:
        raise CheckpointError(f"{note.where} is {weight.dtype} {weight.shape}, expected bytes of {quantization.label}.")
    shape = (weight.shape[0], weight.shape[1] * per_byte)
    groups = shape[1] // quantization.group_size
    padded = tiled_nbytes(shape[0], groups)
    if scales is None or scales.nbytes != padded or scales.dtype not in _SCALES:
        found = "no scales" if scales is None else f"{scales.nbytes:,} bytes of scales ({scales.dtype})"
        raise CheckpointError(
            f"{note.where} has {found}, expected {padded:,} ({' or '.join(_SCALES)}) for {quantization.label}."
        )
    roles = {"weight": weight, "scales": scales}
    return StoredTensor(f"{path}.weight", shape, ComfyBlocks(quantization, shape), roles)
