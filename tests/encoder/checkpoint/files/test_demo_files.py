"""The demo checkpoint: always there, always the same, always usable."""

import hashlib
import logging
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from encoder.checkpoint import load_weights, open_checkpoint
from encoder.checkpoint.files.demo_files import demo_files, write_demo
from encoder.options import ModelOptions
from encoder.pipeline.tokenizer import tokenize
from encoder.presets.built_in import FLUX2_KLEIN, PRESETS
from encoder.qwen3.model import Qwen3
from encoder.types import Tap


def test_weights_are_the_same_bytes_everywhere() -> None:
    """Fingerprints, golden files and the examples in the README depend on it."""
    digest = hashlib.sha256(demo_files()["model.safetensors"]).hexdigest()

    assert digest == "17ef07591b5b61da1f58875c2812147ca918e989e8f079a459988a794e00efd8"


def test_checkpoint_is_a_qwen3_of_36_layers_and_a_megabyte(tmp_path: Path) -> None:
    """Every preset's layers exist."""
    checkpoint = open_checkpoint(ModelOptions("demo", cache_dir=tmp_path))

    assert checkpoint.config.num_hidden_layers == 36
    assert checkpoint.dtype == "bfloat16"
    assert sum(tensor.nbytes for tensor in checkpoint.weights.tensors.values()) < 2**20
    for preset in PRESETS:
        if preset.name != "minimax-h3":  # a model of 64 layers
            preset.taps(36)


def test_random_weights_are_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody should take its hidden states for a real model's."""
    checkpoint = open_checkpoint(ModelOptions("demo", cache_dir=tmp_path))

    assert checkpoint.random_weights
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "RANDOM" in caplog.text


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_every_layer_tells_prompts_apart(tmp_path: Path, dtype: mx.Dtype) -> None:
    """Finite, of a sane size, neither fading nor constant: worth testing against."""
    checkpoint = open_checkpoint(ModelOptions("demo", cache_dir=tmp_path))
    model = Qwen3(checkpoint.config)
    load_weights(checkpoint, model, dtype)
    taps = [Tap(depth, normed=False) for depth in range(37)] + [Tap(36, normed=True)]
    prompts = tokenize(checkpoint.tokenizer, ["a cat", "a dog"], FLUX2_KLEIN)
    cat, dog = (model.hidden_states_at(taps, mx.array([prompt.input_ids])) for prompt in prompts)

    for one, other in zip(cat, dog, strict=True):
        rows, other_rows = (np.array(states.astype(mx.float32))[0] for states in (one, other))
        assert np.isfinite(rows).all()
        assert 0.3 < rows.std() < 10
        assert np.abs(rows - other_rows).max() > 0.5


def test_folder_is_written_once(tmp_path: Path) -> None:
    """The second start only reads."""
    written = (write_demo(tmp_path) / "model.safetensors").stat().st_mtime_ns

    assert (write_demo(tmp_path) / "model.safetensors").stat().st_mtime_ns == written


def test_damaged_folder_is_written_again(tmp_path: Path) -> None:
    """A full disk or a curious user must not break every later start."""
    folder = write_demo(tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").unlink()

    assert write_demo(tmp_path) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == demo_files()
    assert list(tmp_path.iterdir()) == [folder]


def test_concurrent_starts_share_the_folder(tmp_path: Path) -> None:
    """Several servers on one machine, on their first start."""
    code = (
        "import sys, pathlib; from encoder.checkpoint.files.demo_files import write_demo; "
        "print(write_demo(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    starts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    folders = {start.communicate()[0].strip() for start in starts}
    [folder] = folders

    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == demo_files()
    assert [str(path) for path in tmp_path.iterdir()] == [folder]


def test_cache_that_cannot_be_written_is_replaced_by_a_temporary_folder(tmp_path: Path) -> None:
    """Containers often run on a read-only file system."""
    (tmp_path / "file").write_text("not a folder")
    folder = write_demo(tmp_path / "file")

    assert tmp_path not in folder.parents
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == demo_files()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_default_place_follows_the_xdg_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG base directory specification asks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert write_demo().parent == tmp_path / "cache" / "qwen3-encoder"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert write_demo().parent == tmp_path / "home" / ".cache" / "qwen3-encoder"


@pytest.mark.parity
def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    """It is a real Hugging Face checkpoint: same tokens, same hidden states, same chat template."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(ModelOptions("demo", cache_dir=tmp_path))
    [folder] = tmp_path.iterdir()
    [prompt] = tokenize(checkpoint.tokenizer, ["a cät 🦊"], FLUX2_KLEIN)
    model = Qwen3(checkpoint.config)
    load_weights(checkpoint, model, mx.float32)
    ours = model.hidden_states_at([Tap(depth, normed=depth == 36) for depth in range(37)], mx.array([prompt.input_ids]))

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    message = [{"role": "user", "content": "a cät 🦊"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        theirs = reference(**inputs, output_hidden_states=True).hidden_states

    assert text == prompt.text
    assert tuple(inputs.input_ids[0].tolist()) == prompt.input_ids
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(one), other.numpy(), atol=1e-4)
