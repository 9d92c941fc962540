"""Files changed at random, in every format: each is opened, or refused with a CheckpointError, at once."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from encoder.checkpoint import load_weights, open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import Lora, ModelOptions
from encoder.qwen3.model import Qwen3
from tests.checkpoints import write_checkpoint, write_tensors
from tests.encoder.checkpoint.comfyui_files import nvfp4, write_file
from tests.encoder.checkpoint.gguf_files import DIMS, write_gguf
from tests.encoder.checkpoint.lora_files import kohya, make_pairs, peft, write_gguf_lora, write_lora, write_peft
from tests.encoder.checkpoint.mlx_folders import write_quantized
from tests.encoder.checkpoint.ollama_store import Store

ROUNDS = 60
VALUES = (b"0", b"-1", b"null", b"[]", b"{}", b"1e999", b"9" * 20, b'"x"', b"true", b"\0", b"\xff", b"../../x", b"NaN")
Writer = Callable[[Path], tuple[str, list[Path]]]  # writes a checkpoint; what opens it, and the files to change


def folder(path: Path) -> tuple[str, list[Path]]:
    write_checkpoint(path, shards=2)
    return str(path), [path / name for name in ("config.json", "tokenizer.json", "model.safetensors.index.json")]


def mlx_folder(path: Path) -> tuple[str, list[Path]]:
    write_quantized(path, {"bits": 4, "group_size": 64})
    return str(path), [path / "config.json", path / "model.safetensors"]


def comfyui(path: Path) -> tuple[str, list[Path]]:
    tensors = {f"model.{name}": weight for name, weight in write_checkpoint(path / "plain", **DIMS).items()}
    for key in [key for key in tensors if "mlp" in key]:
        tensors |= nvfp4(key.removesuffix(".weight"), tensors[key])[0]
    file = write_file(path, tensors)
    return str(file), [file]


def gguf(path: Path) -> tuple[str, list[Path]]:
    file = path / "model.gguf"
    write_gguf(file, write_checkpoint(path / "plain", **DIMS), "Q8_0")
    return str(file), [file]


def ollama(path: Path) -> tuple[str, list[Path]]:
    store = Store(path)
    store.add_json()
    store.add_weights(lambda name: "int4", "one-blob")
    return "ollama:z-image-turbo", [store.write_manifest()]


@pytest.mark.parametrize("write", [folder, mlx_folder, comfyui, gguf, ollama])
def test_changed_file_is_opened_or_refused(tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback of a library, no wait, no memory; the seed is fixed, so that a failure can be repeated."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    source, files = write(tmp_path)
    rng = random.Random(0)
    for _ in range(ROUNDS):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(change(content, header_length(file, content), rng))
        started = time.process_time()
        refused_or_loaded(source)
        file.write_bytes(content)
        assert time.process_time() - started < 2


@pytest.mark.parametrize("kind", ["peft", "kohya", "gguf"])
def test_changed_lora_is_merged_or_refused(tmp_path: Path, kind: str) -> None:
    pairs = make_pairs(write_checkpoint(tmp_path / "base"))
    if kind == "peft":
        source = write_peft(tmp_path / "lora", peft(pairs), alpha_pattern={"q_proj": 3}, use_rslora=True)
        files = [source / "adapter_config.json", source / "adapter_model.safetensors"]
    elif kind == "kohya":
        source = write_lora(tmp_path / "lora.safetensors", kohya(pairs), lora_adapter_metadata='{"lora_alpha": 3}')
        files = [source]
    else:
        source = write_gguf_lora(tmp_path / "lora.gguf", pairs)
        files = [source]
    rng = random.Random(0)
    for _ in range(ROUNDS):
        file = rng.choice(files)
        content = file.read_bytes()
        file.write_bytes(change(content, min(len(content), header_length(file, content)), rng))
        refused_or_loaded(str(tmp_path / "base"), Lora(str(source)))
        file.write_bytes(content)


def refused_or_loaded(source: str, *loras: Lora) -> None:
    message = ""
    try:
        checkpoint = open_checkpoint(ModelOptions(source, loras=loras))
        load_weights(checkpoint, Qwen3(checkpoint.config), mx.float32)
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


def header_length(file: Path, content: bytes) -> int:
    if file.suffix == ".safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return min(len(content), 12_000)


def change(content: bytes, length: int, rng: random.Random) -> bytes:
    """One of the things that transfers, disks, converters and strangers do to a header."""
    position = rng.randrange(length)
    match rng.randrange(5):
        case 0:
            return content[:position] + bytes([rng.randrange(256)]) + content[position + 1 :]
        case 1:
            return content[:position] + rng.choice([b"\xff", b"\0", b"\x7f"]) * 8 + content[position + 8 :]
        case 2:
            return content[:position] + content[position + rng.randrange(1, 50) :]
        case 3:
            return content[:position]
        case _:
            value = rng.choice(list(re.finditer(rb'\d+|true|false|null|"[^"]{0,30}"', content[:length])))
            return content[: value.start()] + rng.choice(VALUES) + content[value.end() :]


def test_a_hundred_thousand_tensors_are_refused_at_once(tmp_path: Path) -> None:
    """The fingerprint would read a sample of each."""
    write_checkpoint(tmp_path)
    extra = {f"layers.0.{number}.weight": np.zeros(0, np.float32) for number in range(100_000)}
    write_tensors(tmp_path, extra)
    started = time.process_time()

    with pytest.raises(CheckpointError, match="holds 100,000 tensors, expected at most 16,384"):
        open_checkpoint(ModelOptions(str(tmp_path)))
    assert time.process_time() - started < 2
