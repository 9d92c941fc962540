"""Whatever changes a result changes its name on disk."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from encoder.checkpoint.files.safetensors_header import read_header
from encoder.options import ModelOptions
from encoder.qwen3.forward import cpu_kernels
from encoder.qwen3.plain import PlainForward
from encoder.serving.cache.key import model_identity, result_key
from encoder.text_encoder import TextEncoder
from encoder.types import Job, Tap
from tests.checkpoints import write_checkpoint

JOB = Job(
    input_ids=(1, 2, 3),
    computed_rows=3,
    delivered_rows=3,
    dropped_rows=0,
    taps=(Tap(9, False), Tap(18, False)),
    combine="concat",
    dtype="bfloat16",
)
OTHERS: dict[str, list[Any]] = {
    "input_ids": [(1, 2, 4), (1, 23), (12, 3), (3, 2, 1), ()],
    "computed_rows": [4],
    "delivered_rows": [4],
    "dropped_rows": [1],
    "taps": [(Tap(9, False),), (Tap(18, False), Tap(9, False)), (Tap(9, False), Tap(18, True))],
    "combine": ["stack"],
    "dtype": ["float16"],
    "tail_rows": [1],
    "pad_position": [0, 1],
    "pad_token_id": [1],
    "unit_rms": [True],
    "bundle": [2],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the test's own, of two layers."""
    write_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=64, dtype="bfloat16")
    return tmp_path / "model"


def identity(folder: Path, **options: Any) -> str:
    return model_identity(TextEncoder.open(ModelOptions(str(folder), **options)))


def test_every_field_of_a_job_is_known_here() -> None:
    """A new field must be given another value here, so that the next test proves it is in the key."""
    assert list(OTHERS) == [field.name for field in fields(Job)]


def test_every_field_of_a_job_is_in_the_key() -> None:
    jobs = [JOB, *(replace(JOB, **{name: value}) for name, values in OTHERS.items() for value in values)]

    assert len({result_key("identity", job) for job in jobs}) == len(jobs)


def test_the_key_is_the_same_in_every_process() -> None:
    """Else nothing would be found after a restart."""
    expected = "7cb7a0d0ab9ea8ca39e3eb80ac75a28ede112cd3279ddf5ac28b41a5a300a6e9"

    assert result_key("identity", JOB) == expected


def test_another_model_is_another_key() -> None:
    assert result_key("other", JOB) != result_key("identity", JOB)


def test_a_model_opened_again_is_the_same(folder: Path) -> None:
    assert identity(folder) == identity(folder)


def test_a_model_moved_elsewhere_is_the_same(folder: Path, tmp_path: Path) -> None:
    before = identity(folder)

    assert identity(folder.rename(tmp_path / "moved")) == before


def change_one_number(folder: Path) -> None:
    """In the middle of the embedding table, where the fingerprint does not look."""
    file = folder / "model.safetensors"
    [table] = [array for array in read_header(file).arrays if array.key == "model.embed_tokens.weight"]
    with file.open("r+b") as stream:
        stream.seek(table.offset + table.nbytes // 2)
        stream.write(b"\x00")


def write_again(folder: Path) -> None:
    os.utime(folder / "model.safetensors")


@pytest.mark.parametrize("change", [change_one_number, write_again])
def test_a_changed_checkpoint_is_another_model(folder: Path, change: Callable[[Path], None]) -> None:
    before = identity(folder)
    change(folder)

    assert identity(folder) != before


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"compute_dtype": "bfloat16"}, id="compute dtype"),
        pytest.param({"quantize": "8"}, id="quantized"),
    ],
)
def test_another_way_to_compute_is_another_model(folder: Path, options: dict[str, Any]) -> None:
    assert identity(folder, **options) != identity(folder)


def test_fewer_layers_loaded_change_no_result(folder: Path) -> None:
    assert identity(folder, num_layers=1) == identity(folder)


def test_the_plain_forward_is_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = identity(folder)
    monkeypatch.setattr("encoder.qwen3.forward._is_supported", lambda model, dtype: False)

    assert identity(folder) != packed


def identity_with_blas(folder: Path, blas: str) -> str:
    encoder = TextEncoder.open(ModelOptions(str(folder)))
    encoder.__dict__["info"] = replace(encoder.info, blas=blas)  # a cached property
    return model_identity(encoder)


def test_the_blas_and_its_threads_are_part_of_the_plain_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bits of its products depend on both."""
    monkeypatch.setattr("encoder.text_encoder.choose_forward", lambda model, dtype: PlainForward(model))
    monkeypatch.setattr("encoder.text_encoder.widens_bfloat16", lambda config: False)

    assert identity_with_blas(folder, "BLAS with 2 threads") != identity_with_blas(folder, "BLAS with 8 threads")


@pytest.mark.skipif(cpu_kernels() is None, reason="no kernels were compiled for this CPU")
def test_compiled_kernels_give_the_same_on_any_number_of_cpus(folder: Path) -> None:
    """They use no BLAS, and their results do not depend on their threads."""
    assert identity_with_blas(folder, "BLAS with 2 threads") == identity_with_blas(folder, "BLAS with 8 threads")


def test_tf32_is_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    before = identity(folder)
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")

    assert identity(folder) != before


def test_other_code_is_another_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrected forward pass must not answer with what the wrong one has left on disk."""
    package = tmp_path / "encoder"
    (package / "serving" / "cache").mkdir(parents=True)
    (package / "qwen3.py").write_text("a = 1")
    monkeypatch.setattr("encoder.serving.cache.key.__file__", str(package / "serving" / "cache" / "key.py"))
    before = identity(folder)
    (package / "qwen3.py").write_text("a = 2")

    assert identity(folder) != before
