"""Files of strangers: whatever a path leads to, nobody waits for it and nothing is read without end."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError, EncoderError, PresetFileError
from encoder.options import Lora, ModelOptions
from encoder.presets.built_in import BUILT_IN
from encoder.presets.preset_file import read_presets
from encoder.regular_file import UnfitFile, open_file, read_file
from tests.checkpoints import write_checkpoint


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def make_large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**40)  # takes no space


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a pipe, expected a file"),
    "socket": (make_socket, "is a socket, expected a file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "is a device, expected a file"),
    "folder": (Path.mkdir, "is a folder, expected a file"),
    "a terabyte": (make_large, "is 1,099,511,627,776 bytes, expected at most"),
}
unfit = pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)


@unfit
def test_what_is_no_small_file_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "x"
    make(path)

    with pytest.raises(UnfitFile, match=message):
        read_file(path, 1000)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")

    assert read_file(path, 3) == b"abc"
    with pytest.raises(UnfitFile, match="is 3 bytes, expected at most 2"):
        read_file(path, 2)
    with open_file(path) as stream:
        assert (stream.read(1), stream.read()) == (b"a", b"bc")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")
def test_a_file_without_a_size_is_read_up_to_its_limit() -> None:
    assert len(read_file(Path("/proc/self/status"), 2**20)) > 100
    with pytest.raises(UnfitFile, match="is 101 bytes, expected at most 100"):
        read_file(Path("/proc/self/status"), 100)


@pytest.mark.skipif(not os.access("/proc/kmsg", os.R_OK), reason="needs root on Linux")
def test_a_file_that_never_ends_is_not_waited_for() -> None:
    """The kernel's log is a regular file, and waits for the next line."""
    with pytest.raises(OSError, match=r"nothing to read now|not permitted|expected at most"):
        read_file(Path("/proc/kmsg"), 100)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
        *("model.safetensors.index.json", "hf_quant_config.json"),
    ],
)
@unfit
def test_a_model_is_refused_for_a_file_that_is_none(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    """Today's folder is a download, so its files may be links to anything."""
    write_checkpoint(tmp_path, shards=2 if "index" in name else 1)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)

    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x"])
@unfit
def test_a_named_file_that_is_none_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], message: str
) -> None:
    write_checkpoint(tmp_path / "model")
    file = tmp_path / name
    make(file)
    for_model, for_lora = ModelOptions(str(file)), ModelOptions(str(tmp_path / "model"), loras=(Lora(str(file)),))

    for options in (for_model, for_lora):
        with pytest.raises(EncoderError, match=f"{name}: |{name}': "):
            open_checkpoint(options)
    with pytest.raises(PresetFileError, match=message):
        read_presets(file, BUILT_IN)
