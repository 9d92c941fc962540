"""Recognizes quantizations that are not read, so that the error can name them and say what to use instead."""

from encoder.checkpoint.tensors.assemble import Hints, Parts
from encoder.errors import CheckpointError

_TELLTALE_ARRAYS = {  # beside a weight or in place of one; no other quantization has them
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "SCB": "bitsandbytes with 8 bits",
    "absmax": "bitsandbytes with 4 bits",
    "weight_packed": "compressed-tensors with packed integers",
    "W_q": "HQQ",
}


def unsupported(path: str, parts: Parts, hints: Hints) -> None:
    """Scheme that takes no array. Errors: CheckpointError for the arrays of a quantization that is not read."""
    name = next((_TELLTALE_ARRAYS[part] for part in parts if part in _TELLTALE_ARRAYS), None)
    weight = parts.get("weight")
    if weight is not None and weight.dtype == "U8" and weight.shape[1:] == (1,):
        name = "bitsandbytes with 4 bits"  # two numbers in a byte, in one column
    if name is not None:
        array = next(iter(parts.values()))
        raise CheckpointError(
            f"{array.file.name}: {array.key} is quantized by {name}, which is not read here. Take the checkpoint "
            f"before it was quantized so, or one in MLX's format, GGUF or float8; --quantize 4 saves as much memory."
        )
