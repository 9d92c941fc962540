"""Damaged and hostile safetensors files: one clear error each, at once."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encoder.checkpoint.files.safetensors_header import read_header
from encoder.errors import CheckpointError
from tests.checkpoints import write_checkpoint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path / "model.safetensors"


def encode(header: Any, data: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="cut-in-the-length"),
        pytest.param(lambda data: data[:100], id="cut-in-the-header"),
        pytest.param(lambda data: data[:-1], id="cut-in-the-data"),
        pytest.param(lambda data: data + b"\0", id="too-long"),
        pytest.param(lambda data: struct.pack("<Q", 2**63) + data[8:], id="absurd-header-length"),
        pytest.param(lambda data: struct.pack("<Q", 50_000_000) + b" " * 50_000_000, id="header-bomb"),
        pytest.param(lambda data: data[:8] + b"\xff" * 50 + data[58:], id="header-not-utf-8"),
        pytest.param(lambda data: encode([]), id="header-a-list"),
        pytest.param(lambda data: encode({"a": {"dtype": "F32"}}), id="entry-incomplete"),
        pytest.param(lambda data: encode({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24)), id="overlap"),
        pytest.param(lambda data: encode({"a": entry([4], 0, 16), "b": entry([4], 32, 48)}, bytes(48)), id="hole"),
        pytest.param(lambda data: encode({"a": entry([5], 0, 16)}, bytes(16)), id="size-unlike-shape"),
        pytest.param(lambda data: encode({"a": entry([2**40, 2**40], 0, 16)}, bytes(16)), id="dims-overflow"),
        pytest.param(lambda data: encode({"a": entry([-4], 0, 16)}, bytes(16)), id="negative-dim"),
        pytest.param(lambda data: encode({"a": entry([4], 16, 0)}, bytes(16)), id="offsets-swapped"),
        pytest.param(lambda data: encode({"a": entry([4], 0, 16, "F33")}, bytes(16)), id="unknown-dtype"),
        pytest.param(lambda data: b"PK\x03\x04" + b"\0" * 1000, id="a-zip-archive"),
    ],
)
def test_damaged_file_is_named_at_once(file: Path, damage: Callable[[bytes], bytes]) -> None:
    """Within a second and without reading what it claims to hold."""
    file.write_bytes(damage(file.read_bytes()))
    started = time.process_time()

    with pytest.raises(CheckpointError, match=r"model.safetensors: "):
        read_header(file)
    assert time.process_time() - started < 1


def test_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """Deleted between listing and opening, or a dangling link."""
    with pytest.raises(CheckpointError, match=r"gone.safetensors"):
        read_header(tmp_path / "gone.safetensors")


def test_sample_is_the_first_and_the_last_kib(file: Path) -> None:
    """Offsets are counted from the file's first byte, header included."""
    data = file.read_bytes()
    for array in read_header(file).arrays:
        own = data[array.offset : array.offset + array.nbytes]
        assert array.sample() == own[:1024] + own[-1024:]
