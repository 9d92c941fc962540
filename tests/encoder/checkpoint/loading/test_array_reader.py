"""Arrays are read in pieces by several threads, and are what the file holds, bit for bit."""

import gc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from encoder.checkpoint.loading import array_reader
from encoder.checkpoint.loading.array_reader import ArrayReader
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from tests.checkpoints import Array

OFFSET = 13  # nothing says that data are aligned in a file
LENGTH = array_reader._PIECE_BYTES + 7  # in numbers: some pieces, and a short one
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def store(folder: Path, numbers: Array, dtype: str) -> StoredArray:
    file = folder / "numbers"
    file.write_bytes(bytes(OFFSET) + numbers.tobytes() + b"more")
    return StoredArray("numbers", file, dtype, numbers.shape, OFFSET, numbers.nbytes)


def numbers(kind: str) -> Array:
    return np.random.default_rng(0).standard_normal(LENGTH).astype(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_read_and_widened_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Denormals and both zeros too."""
    expected = numbers(kind)
    expected[:4] = [0.0, -0.0, np.finfo(np.float16).smallest_subnormal, -1e-7]
    stored = store(tmp_path, expected, kind)

    with ArrayReader() as reader:
        own, wide = reader.read(stored), reader.read_floats(stored, mx.float32)

    np.testing.assert_array_equal(np.array(wide).view(np.uint32), expected.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(np.array(own.view(mx.uint8)), expected.view(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_found_in_any_piece(tmp_path: Path, kind: str, value: float) -> None:
    for place in (0, LENGTH // 2, LENGTH - 1):
        spoilt = numbers(kind)
        spoilt[place] = value

        with ArrayReader() as reader, pytest.raises(CheckpointError, match=r"numbers: numbers has NaN or infinity"):
            reader.read_floats(store(tmp_path, spoilt, kind), mx.float32)


def test_the_largest_number_is_finite(tmp_path: Path) -> None:
    extremes = np.array([ml_dtypes.finfo(ml_dtypes.bfloat16).max, ml_dtypes.finfo(ml_dtypes.bfloat16).min])

    with ArrayReader() as reader:
        wide = reader.read_floats(store(tmp_path, extremes, "BF16"), mx.float32)

    np.testing.assert_array_equal(np.array(wide), extremes.astype(np.float32))


def test_nothing_but_the_result_takes_memory_of_mlx(tmp_path: Path) -> None:
    """MLX never holds the stored numbers beside the result."""
    stored = store(tmp_path, numbers("BF16"), "BF16")
    gc.collect()  # arrays of tests that failed in reading, which their errors hold
    before = mx.get_active_memory()
    mx.reset_peak_memory()

    with ArrayReader() as reader:
        wide = reader.read_floats(stored, mx.float32)

    assert mx.get_peak_memory() - before == mx.get_active_memory() - before == wide.nbytes


def test_integers_and_floats_of_8_bits_are_read_as_they_are(tmp_path: Path) -> None:
    expected = np.arange(64, dtype=np.uint8).reshape(4, 16)
    stored = store(tmp_path, expected, "F8_E5M2")

    with ArrayReader() as reader:
        np.testing.assert_array_equal(np.array(reader.read(stored)), expected)
        words = reader.read(replace(stored, dtype="U32", shape=(4, 4)))

    np.testing.assert_array_equal(np.array(words), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"nbytes": 10**9, "shape": (10**9,)}, "the file has been changed", id="cut-off"),
        pytest.param({"file": Path("gone")}, "No such file", id="gone"),
        pytest.param({"dtype": "F64", "shape": (8,)}, "has dtype F64", id="dtype-that-mlx-lacks"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: dict[str, object], words: str) -> None:
    stored = replace(store(tmp_path, np.zeros(64, np.uint8), "U8"), **change)  # type: ignore[arg-type]

    with ArrayReader() as reader, pytest.raises(CheckpointError, match=f"numbers cannot be read: .*{words}|{words}"):
        reader.read(stored)
