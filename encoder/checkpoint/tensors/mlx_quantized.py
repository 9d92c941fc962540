"""Weights as MLX quantizes them: `weight` in 32-bit words, `scales`, and in mode affine `biases`.

mlx-lm writes the quantization to config.json, for all layers and for single ones; mflux to the header of each file.
Source: mlx-lm, utils.py:load_model; mflux, models/common/weights/saving/model_saver.py.
"""

from typing import Any

from encoder.checkpoint.tensors.assemble import Hints, Parts, take
from encoder.checkpoint.tensors.dims import columns_of
from encoder.checkpoint.tensors.encodings import FLOATS, MlxQuantized
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.checkpoint.tensors.quantization_config import quantization_config, text_of
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError

_PATH_PREFIXES = ("model.", "language_model.model.", "language_model.", "model.language_model.", "")


def mlx_quantized(path: str, parts: Parts, hints: Hints) -> StoredTensor | None:
    """Scheme for a module with `scales`. Errors: CheckpointError when the arrays do not fit each other."""
    if "scales" not in parts or "weight" not in parts:
        return None
    if parts["weight"].dtype != "U32" and text_of(quantization_config(hints), "quant_method"):  # another library's
        return None
    arrays = take(parts, "weight", "scales", "biases", "global_scale")
    if "qbiases" in parts:  # transformers' MetalLinear
        arrays["biases"] = parts.pop("qbiases")
    return packed_tensor(f"{path}.weight", arrays, _described(path, arrays, hints))


def packed_tensor(name: str, arrays: dict[str, StoredArray], quantization: Quantization) -> StoredTensor:
    """A tensor of arrays in MLX's layout. Compares their shapes and dtypes first.

    Errors: CheckpointError naming the array that does not fit.
    """
    weight, scales = arrays["weight"], arrays["scales"]
    where = f"{weight.file.name}: {weight.key}"
    if weight.dtype != "U32" or len(weight.shape) != 2:
        raise CheckpointError(f"{where} is {weight.dtype} {weight.shape}, expected a matrix of U32 beside its scales.")
    rows, words = weight.shape
    columns = words * 32 // quantization.bits
    expected = (rows, columns // quantization.group_size)
    for role in ("scales", "biases") if quantization.has_biases else ("scales",):
        found = arrays[role].shape if role in arrays else None
        if found != expected or columns % quantization.group_size:
            raise CheckpointError(
                f"{where} has {role} of shape {found}, expected {expected}: {columns} columns, {quantization.label}."
            )
    floats = scales.dtype in FLOATS
    if floats != quantization.has_biases:
        raise CheckpointError(f"{where} has scales of {scales.dtype}, which is not {quantization.label}.")
    return StoredTensor(name, (rows, columns), MlxQuantized(quantization, "global_scale" in arrays), arrays)


def _described(path: str, arrays: dict[str, StoredArray], hints: Hints) -> Quantization:
    """The quantization that config.json says, else that which follows from the stated bits and the shapes."""
    described = hints.config.get("quantization") or hints.config.get("quantization_config")
    if isinstance(described, dict):
        own = next(
            (described[key] for prefix in (hints.prefix, *_PATH_PREFIXES) if (key := prefix + path) in described), None
        )
        fields = own if isinstance(own, dict) else described
        where = "config.json: quantization" + (f" of {path}" if own is not None else "")
        return Quantization.from_fields(fields, where)
    level = hints.metadata.get("quantization_level", "")
    bits = hints.bits.get(hints.prefix + path) or (int(level) if level.isdecimal() else None)
    columns = columns_of(hints.dims, path) if hints.dims is not None else None
    return infer_quantization(arrays, bits, columns)


def infer_quantization(arrays: dict[str, StoredArray], bits: int | None, columns: int | None) -> Quantization:
    """The quantization that the shapes imply. A group is the numbers that share a scale.

    Args:
        arrays: weight, scales and perhaps biases.
        bits: bits of a number, where the file says so.
        columns: numbers in a row, where they are known; the bits follow from them.
    Errors: CheckpointError when neither is known, or MLX has no such quantization.
    """
    weight, scales = arrays["weight"], arrays["scales"]
    where = f"{weight.file.name}: {weight.key}"
    words, groups = weight.shape[-1] if weight.shape else 0, scales.shape[-1] if scales.shape else 0
    if bits is None and columns is not None:
        bits = words * 32 // columns
    if not bits or not groups:
        raise CheckpointError(f"{where} is quantized, and nothing says how: expected `quantization` in config.json.")
    fields: dict[str, Any] = {"mode": "affine", "bits": bits, "group_size": words * 32 // bits // groups}
    if "biases" not in arrays:
        fields["mode"] = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}.get((bits, fields["group_size"]))
        if fields["mode"] is None:
            raise CheckpointError(f"{where} has scales and no biases, {bits} bits in groups of {fields['group_size']}.")
    return Quantization.from_fields(fields, where)
