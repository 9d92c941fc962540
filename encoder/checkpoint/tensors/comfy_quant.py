"""ComfyUI's quantizations, each layer's by the name that the file gives it (see comfy_note.py).

Source: ComfyUI 0271a46, comfy/quant_ops.py:QUANT_ALGOS, comfy/ops.py:_load_quantized_module; the names that ComfyUI
itself does not know are those of convert_to_quant 1.3.4, constants.py:VALID_QUANT_FORMATS.
"""

from collections.abc import Callable

from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.comfy_blocks import mxfp8, nvfp4
from encoder.checkpoint.tensors.comfy_int4 import awq_w4a16, convrot_w4a4, w4a8
from encoder.checkpoint.tensors.comfy_note import Note, find_note
from encoder.checkpoint.tensors.scaled import scaled_tensor
from encoder.checkpoint.tensors.transformed import is_rotation, transformed
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError

Reader = Callable[[str, Parts, Note], StoredTensor]  # takes out of the parts what belongs to the weight


def _scaled(path: str, parts: Parts, note: Note) -> StoredTensor:
    return scaled_tensor(path, parts)


def _squares(path: str, parts: Parts, note: Note) -> StoredTensor:
    size = note.count("group_size", 64 if note.format.startswith("float8") else 128)
    return scaled_tensor(path, parts, (size, size))


_FORMATS: dict[str, Reader] = {
    "float8_e4m3fn": _scaled,
    "float8_e5m2": _scaled,
    "float8_e4m3fn_rowwise": _scaled,
    "float8_e4m3fn_blockwise": _squares,
    "float8_e4m3fn_block3d": _scaled,
    "int8_tensorwise": _scaled,
    "int8_blockwise": _squares,
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "hybrid_mxfp8": mxfp8,
    "convrot_w4a4": convrot_w4a4,
    "asym_w4a8_int8": w4a8,
    "w4a8_int8": w4a8,
    "w4a8": w4a8,
    "awq_w4a16": awq_w4a16,
}
_ALWAYS_ROTATED = (convrot_w4a4, w4a8)


def comfy_quant(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a module whose format the file names.

    Errors: CheckpointError for a format that is not read here, or arrays that do not fit it.
    """
    beside, weight = take(parts, "comfy_quant").get("comfy_quant"), parts.get("weight")
    note = find_note(path, weight, beside, hints) if weight is not None else None
    if note is None:
        _expect_no_rotation(weight)
        return None
    read = _FORMATS.get(note.format)
    if read is None:
        raise CheckpointError(
            f"{note.where} has ComfyUI's format {note.format!r:.80}, which is not read here, expected one of "
            f"{', '.join(_FORMATS)}. Take another file of this model."
        )
    tensor = read(path, parts, note)
    rotation = note.columns_rotated_together if read in _ALWAYS_ROTATED else _rotation(note, tensor, hints)
    return transformed(tensor, parts, rotation)


def _expect_no_rotation(weight: StoredArray | None) -> None:
    """Tools that save a file anew may lose the notes, and integers that are rotated look like any others."""
    if weight is not None and weight.dtype == "I8" and "convrot" in weight.file.name.lower():
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} is I8 and has no note (comfy_quant), and the file's name says that its "
            f"weights are rotated (convrot). Take the file as it was published."
        )


def _rotation(note: Note, tensor: StoredTensor, hints: Hints) -> int | None:
    """The columns that are rotated together. Some tools mark layers, too, that are too narrow for it."""
    rotation = note.rotation
    if rotation is None or not is_rotation(rotation) or tensor.shape[-1] % rotation == 0:
        return rotation
    hints.notices[
        f"{tensor.file.name}: a layer is marked as rotated in blocks of {rotation:,} columns, which do not divide its "
        f"columns; it is read as not rotated"
    ] += 1
    return None
