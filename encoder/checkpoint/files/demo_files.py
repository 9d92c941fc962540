"""The demo checkpoint: a 36-layer Qwen3 of about a megabyte whose weights are random.

It has the layers of every preset and needs no download, so a server starts in seconds; its hidden states mean nothing.
It is written as a Hugging Face folder, with the same bytes on every platform.
"""

import atexit
import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoder.checkpoint.files.demo_tokenizer import VOCAB_SIZE, tokenizer_config, tokenizer_json

log = logging.getLogger(__name__)

_SEED = 20250428  # the day Qwen3 was released; any number would do

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": 258,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 2,
    "num_hidden_layers": 36,
    "num_key_value_heads": 1,
    "random_weights": True,  # a field of ours: the service shows it
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB_SIZE,
}

README = """# Demo checkpoint: random weights

A Qwen3 text model of 36 layers and hidden size 32, made from a fixed seed. Nobody trained it: its hidden states have
the right shapes and mean nothing. It exists so that a server can start and be tried out without a download. The
tokenizer has one token for each byte, and Qwen3's special tokens.

It is made again when it is missing or was changed.
"""


def write_demo(cache_dir: Path | None = None) -> Path:
    """The folder of the demo checkpoint, written if it does not exist yet.

    Args:
        cache_dir: folder to keep it in; None means `$XDG_CACHE_HOME/qwen3-encoder`, or `~/.cache/qwen3-encoder`.
            Where that is not writable, a temporary folder is used, and removed when the process ends.
    """
    files = demo_files()
    content = hashlib.sha256(b"".join(files.values())).hexdigest()[:8]  # other versions have a folder of their own
    try:
        folder = (cache_dir or _default_cache_dir()) / f"demo-{content}"
        if not _holds(folder, files):
            _write_atomically(folder, files)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        folder = Path(tempfile.mkdtemp(prefix="qwen3-encoder-demo-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        log.info("the demo checkpoint goes to %s, its cache is not writable: %s", folder, error)
        _write(folder, files)
    return folder


def demo_files() -> dict[str, bytes]:
    """The demo checkpoint's files by name; the same bytes at every call and on every platform."""
    return {
        "config.json": _json(CONFIG),
        "model.safetensors": _safetensors(demo_tensors()),
        "tokenizer.json": _json(tokenizer_json()),
        "tokenizer_config.json": _json(tokenizer_config()),
        "README.md": README.encode(),
    }


def demo_tensors() -> dict[str, NDArray[np.uint16]]:
    """The weights under the checkpoint's keys, as bfloat16 bit patterns.

    Matrices are uniform with the variance that keeps activations near 1; what is added to the residual stream is
    smaller, so that 36 layers neither fade nor blow up. Norm weights are spread around 1, so that a norm forgotten or
    applied twice shows.
    """
    generator = np.random.PCG64(_SEED)
    layers = CONFIG["num_hidden_layers"]
    tensors = {}
    for key, shape in _shapes().items():
        uniform = _uniform(generator, shape)
        if len(shape) == 1:
            values = 1.0 + 0.5 * uniform
        elif key.endswith("embed_tokens.weight"):
            values = uniform
        elif key.endswith(("o_proj.weight", "down_proj.weight")):
            values = uniform * (3.0 / shape[1]) ** 0.5 * (4.0 / layers) ** 0.5
        else:
            values = uniform * (3.0 / shape[1]) ** 0.5
        tensors[key] = _bfloat16_bits(values)
    return tensors


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, intermediate, head_dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    width, kv_width = CONFIG["num_attention_heads"] * head_dim, CONFIG["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}
    for index in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (width, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv_width, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv_width, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, width),
            f"{layer}.self_attn.q_norm.weight": (head_dim,),
            f"{layer}.self_attn.k_norm.weight": (head_dim,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, intermediate),
        }
    return shapes | {"model.norm.weight": (hidden,)}


def _uniform(generator: np.random.PCG64, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Numbers in [-1, 1) from the generator's raw output: exact everywhere, as NumPy's distributions need not be."""
    raw: NDArray[np.uint64] = generator.random_raw(prod(shape))
    return (raw >> np.uint64(40)).astype(np.float64).reshape(shape) / 2**23 - 1.0


def _bfloat16_bits(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, to even on a tie."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _safetensors(tensors: dict[str, NDArray[np.uint16]]) -> bytes:
    """A safetensors file: header length, header, data. Written without the library, whose versions may differ."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, bits in tensors.items():
        header[key] = {"dtype": "BF16", "shape": list(bits.shape), "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = b"".join(bits.astype("<u2").tobytes() for bits in tensors.values())
    return struct.pack("<Q", len(encoded)) + encoded + data


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "qwen3-encoder"


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in files.items())


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _write_atomically(folder: Path, files: dict[str, bytes]) -> None:
    """Write the folder beside its place and rename it, so that nobody reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
        fresh.mkdir()
        _write(fresh, files)
        if folder.exists():
            folder.rename(old)  # damaged or edited
        try:
            fresh.rename(folder)
        except OSError:
            if not _holds(folder, files):  # else another process wrote it first
                raise
