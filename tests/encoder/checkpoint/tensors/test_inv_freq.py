"""RoPE's frequencies in a file give the theta that they were made from."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from encoder.checkpoint.files.safetensors_header import read_header
from encoder.checkpoint.tensors.inv_freq import theta_from_frequencies
from encoder.errors import CheckpointError


def frequencies(theta: float, head_dim: int = 128) -> Any:
    return (1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)


def theta_in(folder: Path, arrays: dict[str, Any], head_dim: int = 128) -> float | None:
    save_file(arrays, folder / "model.safetensors")
    return theta_from_frequencies(read_header(folder / "model.safetensors").arrays, head_dim)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 5e6])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_theta_is_found_in_every_dtype(tmp_path: Path, theta: float, dtype: Any, head_dim: int) -> None:
    """mflux can save a component in bfloat16."""
    array = frequencies(theta, head_dim).astype(dtype)

    assert theta_in(tmp_path, {"rotary_emb.inv_freq": array}, head_dim) == theta


def test_any_theta_is_found(tmp_path: Path) -> None:
    assert theta_in(tmp_path, {"model.rotary_emb.inv_freq": frequencies(1234567)}) == 1234570


def test_one_in_each_layer_is_one(tmp_path: Path) -> None:
    """As transformers saved them until 2023. A vision tower's are of another kind."""
    arrays = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies(5e6) for layer in range(3)}
    arrays["visual.rotary_pos_emb.inv_freq"] = frequencies(1e4, 32)

    assert theta_in(tmp_path, arrays) == 5e6


def test_none_is_none(tmp_path: Path) -> None:
    assert theta_in(tmp_path, {"model.norm.weight": frequencies(1e6)}) is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({"rotary_emb.inv_freq": frequencies(1e6) / 4}, "If RoPE is scaled", id="linear"),
        pytest.param({"rotary_emb.inv_freq": frequencies(1e6)[:5]}, "holds 5 frequencies, expected the 64", id="few"),
        pytest.param({"rotary_emb.inv_freq": np.zeros((0,), np.float32)}, "holds 0 frequencies", id="none"),
        pytest.param({"rotary_emb.inv_freq": np.full(64, np.nan, np.float32)}, "follow from", id="nan"),
        pytest.param({"rotary_emb.inv_freq": np.zeros(64, np.float32)}, "follow from", id="zeros"),
        pytest.param(
            {"a.rotary_emb.inv_freq": frequencies(1e6), "b.rotary_emb.inv_freq": frequencies(5e6)},
            "from 5000000. Give",
            id="two",
        ),
    ],
)
def test_frequencies_of_no_theta_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        theta_in(tmp_path, arrays)

    assert "--rope-theta" in str(raised.value)
