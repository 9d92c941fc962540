"""Recognizes quantizations that are not read, so that the error can name them and say what to use instead."""

from collections.abc import Mapping
from typing import Any

from encoder.checkpoint.tensors.assemble import Hints, Parts, is_buffer
from encoder.checkpoint.tensors.encodings import FLOATS
from encoder.checkpoint.tensors.quantization_config import quantization_config, text_of
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError

_BY_ARRAYS = {  # an array beside a weight, or in place of one, that no other quantization has
    "B": "Marlin",
    "Qidxs": "QuIP#",
    "SCB": "bitsandbytes with 8 bits",
    "W_q": "HQQ",
    "_weight_qdata": "torchao",
    "bitmask": "compressed-tensors with a sparse bitmask",
    "centroids": "VPTQ",
    "codebooks": "AQLM",
    "dense_weights": "SpQR",
    "forward_hadamard_matrix": "FP-Quant",
    "meta": "compressed-tensors with 2:4 sparsity (marlin-24)",
    "q_weight": "ExLlamaV2",
    "qscales": "Nunchaku",
    "qweight": "GPTQ or AWQ, in an order of their numbers that is not known",
    "qzeros": "GPTQ or AWQ, in an order of their numbers that is not known",
    "svd_up": "SDNQ, whose config.json would say how",
    "tables2": "HIGGS",
    "trellis": "ExLlamaV3",
    "weight.absmax": "bitsandbytes with 4 bits",
    "weight_packed": "compressed-tensors",
    "weight_scale_2": "nvfp4, in an order that ModelOpt's config.json or ComfyUI's notes would name",
    "weight_scales": "EETQ",
    "wscales": "Nunchaku",
    "zero_point": "SDNQ, whose config.json would say how",
}
_BY_DTYPE = {  # which no config tells from the float8 that is read
    "F8_E4M3FNUZ": "float8 of AMD's older GPUs (e4m3fnuz)",
    "F8_E5M2FNUZ": "float8 of AMD's older GPUs (e5m2fnuz)",
}
_WIDE = ("F64", "C64")  # of no quantization; assemble.py reads the first, and says what it expects of the second
_NAMES = {  # by quant_method; others are called as the config calls them
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "exl2": "ExLlamaV2",
    "exl3": "ExLlamaV3",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "intel/auto-round": "AutoRound",
    "modelopt": "NVIDIA ModelOpt",
    "quark": "AMD Quark",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
_VARIANTS = ("checkpoint_format", "packing_format", "format", "version", "quant_algo", "quant_type")


def unsupported(path: str, parts: Parts, hints: Hints) -> None:
    """Scheme that takes no array, the last to be asked.

    Errors: CheckpointError for an array that is not floats, and for one that floats do not have beside them.
    """
    name = next((_BY_ARRAYS[part] for part in parts if part in _BY_ARRAYS), None)
    plain = (*FLOATS, *_WIDE)
    strange = [array for part, array in parts.items() if array.dtype not in plain and not is_buffer(part, parts)]
    array = next(iter(strange or (parts.values() if name is not None else ())), None)
    if array is None:
        return
    name = (
        _BY_DTYPE.get(array.dtype)
        or _described(quantization_config(hints))
        or name
        or "a quantization of which nothing is known here"
    )
    raise not_read(array, name)


def not_read(array: StoredArray, name: str) -> CheckpointError:
    """The error for an array of a quantization that is not read: what it is, and which file to take instead."""
    return CheckpointError(
        f"{array.file.name}: {array.key} ({array.dtype} {array.shape}) is quantized by {name}, which is not read. Take "
        f"the model as it was before, or a file in MLX's format, GGUF or float8; --quantize 4 saves as much memory."
    )


def _described(config: Mapping[str, Any]) -> str:
    """What config.json calls the quantization, `GPTQ (marlin)`; "" where it calls it nothing."""
    method, variant = text_of(config, "quant_method", "quant_library"), text_of(config, *_VARIANTS)
    name = _NAMES.get(method, method)
    return f"{name} ({variant})"[:80] if name and variant not in ("", method) else name[:80]
