"""The fingerprint follows the content: it keys the cache, and tells people which weights they are on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.files.demo_files import CONFIG
from encoder.checkpoint.tensors.fingerprint import fingerprint as fingerprint_of
from encoder.options import ModelOptions
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.rope import LinearScaling
from tests.checkpoints import write_checkpoint, write_pipeline, write_tensors


def fingerprint(folder: Path) -> str:
    return open_checkpoint(ModelOptions(str(folder))).fingerprint


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({"shards": 3}, id="sharded"),
        pytest.param({"prefix": "model.language_model."}, id="other-prefix"),
        pytest.param({"rope": "rope_theta"}, id="theta-elsewhere"),
        pytest.param({"tie_word_embeddings": False}, id="with-a-head"),
    ],
)
def test_same_weights_in_another_form_have_the_same_fingerprint(tmp_path: Path, form: dict[str, Any]) -> None:
    """A copy in another place or layout gives the same hidden states."""
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", **form)
    write_pipeline(tmp_path / "c", **form)

    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") == fingerprint(tmp_path / "c")
    assert len(fingerprint(tmp_path / "a")) == 32


@pytest.mark.parametrize(
    "difference",
    [
        pytest.param({"seed": 1}, id="weights"),
        pytest.param({"dtype": "bfloat16"}, id="dtype"),
        pytest.param({"rope_theta": 5e6}, id="rope-theta"),
        pytest.param({"rms_norm_eps": 1e-5}, id="eps"),
        pytest.param({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, id="heads"),
    ],
)
def test_whatever_changes_the_hidden_states_changes_the_fingerprint(tmp_path: Path, difference: dict[str, Any]) -> None:
    """Else the cache would hand out another model's results."""
    write_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", **difference)

    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_number_at_either_end_of_a_tensor_shows(tmp_path: Path, position: int) -> None:
    """Both ends are sampled."""
    weights = write_checkpoint(tmp_path)
    before = fingerprint(tmp_path)
    weights["embed_tokens.weight"][position, position] += 1
    write_tensors(tmp_path, weights)

    assert fingerprint(tmp_path) != before


def test_scaled_rope_changes_the_fingerprint_and_plain_rope_leaves_it() -> None:
    """Results that were stored before RoPE could be scaled are still found."""
    plain = Qwen3Config.from_dict(CONFIG)
    scaled = [replace(plain, rope_scaling=LinearScaling(factor)) for factor in (2.0, 4.0)]

    assert fingerprint_of(plain, {}) == "fc08bef5e2718abece5e72ef2f3ae43c"
    assert len({fingerprint_of(config, {}) for config in (plain, *scaled)}) == 3
