"""Which reader opens what the user typed."""

import os
from pathlib import Path

import pytest

from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint, write_json


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting in a file is not expanded by a shell."""
    write_checkpoint(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert open_checkpoint(ModelOptions("~/model")).name == "~/model"


def test_folder_named_like_a_hub_id_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder needs no network."""
    write_checkpoint(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)

    assert open_checkpoint(ModelOptions("org/model")).revision is None


@pytest.mark.parametrize("source", ["", "nothing", "/no/such/folder", "./org/model", "org/model@", "x" * 5000, "a\0"])
def test_source_that_is_nothing_says_what_was_looked_for(source: str) -> None:
    """A typing error is the usual cause."""
    with pytest.raises(CheckpointError, match=r"no such folder or file, and not a hub id.*'demo'"):
        open_checkpoint(ModelOptions(source))


def test_file_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    """Above all pickle, which can run code."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04archive/data.pkl")

    with pytest.raises(CheckpointError, match=r"model.ckpt: is a PyTorch pickle or a zip"):
        open_checkpoint(ModelOptions(str(tmp_path / "model.ckpt")))
    (tmp_path / "model.bin").write_bytes(bytes(range(99)))
    with pytest.raises(CheckpointError, match=r"model.bin: is a file of no known format"):
        open_checkpoint(ModelOptions(str(tmp_path / "model.bin")))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: describes a part of a model. Give the folder"):
        open_checkpoint(ModelOptions(str(tmp_path / "tokenizer.json")))


def test_quotes_around_a_path_are_pointed_at(tmp_path: Path) -> None:
    """Docker hands over those of an --env-file."""
    write_checkpoint(tmp_path)

    with pytest.raises(CheckpointError, match=r"has quotes or blanks around it"):
        open_checkpoint(ModelOptions(f'"{tmp_path}"'))


def test_file_of_a_folder_means_the_folder(tmp_path: Path) -> None:
    """File managers give the path of a file, not of its folder."""
    write_checkpoint(tmp_path, rope_theta=7e6)

    assert open_checkpoint(ModelOptions(str(tmp_path / "model.safetensors"))).config.rope_theta == 7e6


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"])
def test_file_that_describes_a_folder_means_the_folder(tmp_path: Path, name: str) -> None:
    """So does one shard of several, also where no index names it."""
    weights = write_checkpoint(tmp_path, shards=2, rope_theta=7e6)
    if name.endswith("safetensors"):
        (tmp_path / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path / name)))

    assert (checkpoint.config.rope_theta, checkpoint.weights.tensors.keys()) == (7e6, weights.keys())


def test_url_of_a_file_is_its_path(tmp_path: Path) -> None:
    """Browsers and drag and drop give them, with blanks escaped."""
    write_checkpoint(tmp_path / "my model", rope_theta=7e6)
    url = (tmp_path / "my model").as_uri()

    assert "%20" in url
    assert open_checkpoint(ModelOptions(url)).config.rope_theta == 7e6


@pytest.mark.parametrize("name", ["5d6f", "model.sft", "model.safetensors.download"])
def test_content_says_the_format_where_the_name_does_not(tmp_path: Path, name: str) -> None:
    """Blobs of the hub's cache and of Ollama's store have no suffix; ComfyUI takes .sft for .safetensors."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)

    assert open_checkpoint(ModelOptions(str(tmp_path / name))).origin.format == "safetensors file"


@pytest.mark.parametrize("source", ["demo", "folder"])
def test_revision_of_something_that_is_not_on_the_hub_is_refused(tmp_path: Path, source: str) -> None:
    """Ignored, it would leave the user believing in a pinned commit."""
    write_checkpoint(tmp_path)

    with pytest.raises(CheckpointError, match="is no hub repository, so it has no revision 'v1'"):
        open_checkpoint(ModelOptions("demo" if source == "demo" else str(tmp_path), revision="v1"))


def test_error_of_the_file_system_is_passed_on(tmp_path: Path) -> None:
    """Permissions, a share that is gone, or here a name that no file can have."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    key = "model.layers.0.self_attn.q_norm.weight"
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {key: "x" * 1000}})

    with pytest.raises(CheckpointError, match=r"cannot be read: .*File name too long"):
        open_checkpoint(ModelOptions(str(tmp_path)))


def test_linked_files_are_followed(tmp_path: Path) -> None:
    """The hub's cache is made of links into a folder of blobs."""
    write_checkpoint(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        os.symlink(file, tmp_path / "snapshot" / file.name)

    assert len(open_checkpoint(ModelOptions(str(tmp_path / "snapshot"))).weights.tensors) == 24
