"""A quantization that is not read gives one error, which names it and says what to do."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint, write_json, write_tensors

WORDS = np.zeros((16, 4), np.int32)
HALVES = np.ones(32, np.float16)
PATH = "model.layers.0.mlp.up_proj"
FORMS: dict[str, tuple[dict[str, Array], dict[str, Any]]] = {
    "ExLlamaV2": ({"q_weight": WORDS, "q_scale": WORDS, "q_invperm": WORDS}, {"quant_method": "exl2"}),
    "ExLlamaV3": ({"trellis": np.zeros((1, 2, 48), np.int16), "suh": HALVES, "svh": HALVES}, {}),
    "AQLM": ({"codes": WORDS.astype(np.int8), "codebooks": np.ones((1, 256, 1, 8), np.float16)}, {}),
    "VPTQ": ({"centroids": HALVES, "indices": WORDS}, {"quant_method": "vptq"}),
    "EETQ": ({"weight": np.zeros((16, 32), np.int8), "weight_scales": HALVES}, {}),
    "BitNet": ({"weight": np.zeros((8, 16), np.uint8), "weight_scale": HALVES[:1]}, {"quant_method": "bitnet"}),
    "Marlin": ({"B": WORDS, "s": HALVES}, {}),
    r"GPTQ \(marlin\)": (
        {"qweight": np.zeros((1, 64), np.int32), "scales": HALVES[None]},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
    ),
    r"AWQ \(gemv\)": (
        {"qweight": np.zeros((32, 2), np.int32), "qzeros": WORDS, "scales": np.ones((32, 8), np.float16)},
        {"quant_method": "awq", "version": "gemv"},
    ),
    "HIGGS": (
        {"weight": WORDS.astype(np.int16), "scales": HALVES[None], "tables": HALVES, "tables2": HALVES},
        {"quant_method": "higgs"},
    ),
    r"GPTQ \(gptq_p\)": (
        {"qweight": np.zeros((2, 40), np.int32), "scales": HALVES[None], "qzeros": WORDS},
        {"quant_method": "gptq", "checkpoint_format": "gptq_p"},
    ),
    "nvfp4, in an order that .* would name": (
        {
            "weight": np.zeros((32, 8), np.uint8),
            "weight_scale": np.ones((32, 1), ml_dtypes.float8_e4m3fn),
            "weight_scale_2": np.ones((), np.float32),
        },
        {},
    ),
    "SDNQ, whose config.json would say how": (
        {"weight": np.zeros(256, np.uint8), "scale": HALVES[:, None], "zero_point": HALVES[:, None]},
        {},
    ),
    "some-new-method": ({"weight": WORDS, "weight_scale": HALVES}, {"quant_method": "Some-New-Method"}),
    "a quantization of which nothing is known here": ({"weight": np.zeros((32, 16), np.uint16)}, {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_it_is_named_with_a_way_out(tmp_path: Path, name: str) -> None:
    arrays, described = FORMS[name]
    write(tmp_path, arrays, described)

    with pytest.raises(CheckpointError, match=rf"^\S+: {PATH}\S+ \(\w+ .*\) is quantized by {name}, .* Take") as caught:
        open_checkpoint(ModelOptions(str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, np.int64, np.bool_])
def test_types_that_no_weight_has_are_named(tmp_path: Path, dtype: Any) -> None:
    """safetensors knows more dtypes than models have."""
    write(tmp_path, {"weight": np.zeros((32, 16), dtype)}, {})

    with pytest.raises(CheckpointError, match=rf"{PATH}.weight \(\w+ .*nothing is known here, which is not read"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_complex_numbers_are_not_taken_for_a_quantization(tmp_path: Path) -> None:
    write(tmp_path, {"weight": np.zeros((32, 16), np.complex64)}, {})

    with pytest.raises(CheckpointError, match=rf"{PATH}.weight has dtype C64, expected BF16, F16, F32"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def write(folder: Path, arrays: dict[str, Array], described: dict[str, Any]) -> None:
    """A checkpoint with these arrays in place of one weight, and this quantization_config."""
    weights = write_checkpoint(folder)
    tensors: dict[str, Array] = {f"model.{key}": array for key, array in weights.items()}
    del tensors[f"{PATH}.weight"]
    write_tensors(folder, tensors | {f"{PATH}.{part}": array for part, array in arrays.items()})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | ({"quantization_config": described} if described else {}))
