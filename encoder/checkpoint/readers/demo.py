"""The demo checkpoint: a real 36-layer Qwen3 of about a megabyte whose weights are random.

Every preset's layers exist in it and it needs no download, so a server starts in seconds; its hidden states mean
nothing. Written as a Hugging Face folder, the same bytes on every platform, and read by the reader of any such folder.
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
from tokenizers.pre_tokenizers import ByteLevel

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.readers.huggingface import open_folder
from encoder.checkpoint.request import Request

log = logging.getLogger(__name__)

_SEED = 20250428  # the day Qwen3 was released; any number would do

_ADDED_TOKENS = (  # in Qwen3's order, which puts them right behind the byte-pair vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
_SPECIAL_TOKENS = _ADDED_TOKENS[:14]  # the others are plain text to a decoder that skips special tokens

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
    "random_weights": True,  # ours: the reader passes it on, so that the service says so
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 256 + len(_ADDED_TOKENS),
}

CHAT_TEMPLATE = (  # renders a single user turn as Qwen3's own template does
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

README = """# Demo checkpoint: random weights

A Qwen3 text model of 36 layers and hidden size 32, made from a fixed seed. Nobody trained it: its hidden states have
the right shapes and mean nothing. It exists so that a server can start and be tried out without a download. The
tokenizer has one token for each byte, and Qwen3's special tokens.

It is made again when it is missing or was changed.
"""


def recognizes(request: Request) -> bool:
    """The word `demo`."""
    return request.source == "demo"


def open_request(request: Request) -> Checkpoint:
    """Describe the demo checkpoint, after writing it where it is missing."""
    return open_folder(write_demo(request.options.cache_dir), request)


def write_demo(cache_dir: Path | None = None) -> Path:
    """The folder of the demo checkpoint, written if it is not there already.

    Args:
        cache_dir: folder to keep it in; None means `$XDG_CACHE_HOME/qwen3-encoder`, or `~/.cache/qwen3-encoder`.
            Where that cannot be written to, a temporary folder is used until the process ends.
    """
    files = demo_files()
    content = hashlib.sha256(b"".join(files.values())).hexdigest()[:8]  # versions do not overwrite each other
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
        "tokenizer_config.json": _json(_tokenizer_config()),
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


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE without merges: one token for each byte, then Qwen3's added tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, **_added_token(token)}
            for token_id, token in enumerate(_ADDED_TOKENS, start=len(alphabet))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level | {"use_regex": True},  # or whole prompts would fill the library's cache of words
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: token_id for token_id, character in enumerate(alphabet)},
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {"content": token, **_added_token(token)}
            for token_id, token in enumerate(_ADDED_TOKENS, start=256)
        },
        "additional_special_tokens": list(_SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _added_token(token: str) -> dict[str, bool]:
    special = token in _SPECIAL_TOKENS
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}


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
    """A safetensors file: header length, header, data. Written by hand to be the same under every library version."""
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
    """Put the whole folder in place with one rename, so that nobody ever reads half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
        fresh.mkdir()
        _write(fresh, files)
        if folder.exists():
            folder.rename(old)  # damaged, or changed by someone
        try:
            fresh.rename(folder)
        except OSError:
            if not _holds(folder, files):  # else another process was faster
                raise
