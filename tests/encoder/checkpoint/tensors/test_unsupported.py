"""A quantization that is not read gives one error, which names it and says what to do."""

from pathlib import Path

import numpy as np
import pytest

from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint, write_tensors

WORDS = np.zeros((16, 4), np.int32)
PATH = "model.layers.0.mlp.up_proj"
FORMS: dict[str, dict[str, Array]] = {
    "GPTQ or AWQ": {
        "qweight": WORDS,
        "qzeros": WORDS,
        "scales": np.ones((1, 32), np.float16),
        "g_idx": np.zeros(16, np.int32),
    },
    "bitsandbytes with 8 bits": {"weight": np.zeros((32, 16), np.int8), "SCB": np.ones(32, np.float32)},
    "bitsandbytes with 4 bits": {
        "weight": np.zeros((256, 1), np.uint8),
        "weight.absmax": np.zeros(8, np.uint8),
        "weight.quant_map": np.zeros(16, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8),
    },
    "compressed-tensors with packed integers": {
        "weight_packed": WORDS,
        "weight_scale": np.ones((32, 1), np.float16),
        "weight_shape": np.array([32, 16]),
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_it_is_named_with_a_way_out(tmp_path: Path, name: str) -> None:
    weights = write_checkpoint(tmp_path)
    tensors: dict[str, Array] = {f"model.{key}": array for key, array in weights.items()}
    del tensors[f"{PATH}.weight"]
    write_tensors(tmp_path, tensors | {f"{PATH}.{part}": array for part, array in FORMS[name].items()})

    with pytest.raises(CheckpointError, match=rf"up_proj[\w.]+ is quantized by {name}, .* Take the checkpoint before"):
        open_checkpoint(ModelOptions(str(tmp_path)))
