"""Writes checkpoints that MLX has quantized."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import Array, quantize_with_mlx, write_checkpoint, write_json, write_tensors

DIMS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "dtype": "bfloat16"}


def write_quantized(folder: Path, quantization: Mapping[str, Any], shards: int = 1, **form: Any) -> dict[str, Array]:
    """Write a folder as mlx-lm does; its weights as they are after decoding, by parameter name."""
    weights = write_checkpoint(folder, **{**DIMS, **form})
    arrays, decoded = quantize_with_mlx(weights, quantization)
    write_tensors(folder, {f"model.{name}": array for name, array in arrays.items()}, shards)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization": quantization, "quantization_config": quantization})
    return decoded
