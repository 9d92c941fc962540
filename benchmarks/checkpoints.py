"""Checkpoints to measure with: random weights of any dims, and a tokenizer trained on the prompts."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PROMPTS = Path(__file__).with_name("prompts.txt")
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE_WORDS = ["user\n", "assistant\n", "system\n", "\n\n"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Dims:
    """Dims of a Qwen3 text model, named as in config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    vocab_size: int = 151936


QWEN3_0_6B = Dims(1024, 3072, 16, 8)
QWEN3_4B = Dims(2560, 9728, 32, 8)


def read_prompts(file: Path = PROMPTS) -> list[str]:
    """The prompts of a file that has one in each line."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line]


def write_checkpoint(
    folder: Path, dims: Dims, layers: int, tokenizer: Path | None = None, prompts: Sequence[str] = ()
) -> None:
    """Write a Hugging Face folder with random bfloat16 weights.

    Args:
        tokenizer: a folder with Qwen3's own tokenizer; None trains one on `prompts`.
    """
    random = np.random.default_rng(0)
    tensors = {f"model.{name}": _weight(random, shape) for name, shape in _shapes(dims, layers).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = asdict(dims) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is None:
        write_tokenizer(folder, prompts or read_prompts())
    else:
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, folder)


def write_tokenizer(folder: Path, prompts: Sequence[str]) -> None:
    """Train a byte-pair tokenizer on the prompts, with Qwen3's control tokens.

    It gives about as many tokens as Qwen3's own.
    """
    # Imported here, since importing encoder would give a peer's process our BLAS.
    from encoder.checkpoint.files.demo_tokenizer import CHAT_TEMPLATE

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*prompts, *TEMPLATE_WORDS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": CONTROL_TOKENS[0],
        "eos_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def read_weights(folder: Path) -> list[tuple[str, Any]]:
    """The weights by the model's parameter names, as MLX arrays in float32."""
    import mlx.core as mx  # imported here, so that a caller can import encoder, and its BLAS, first

    arrays: Any = mx.load(str(folder / "model.safetensors"))
    return [(name.removeprefix("model."), array.astype(mx.float32)) for name, array in arrays.items()]


def _shapes(dims: Dims, layers: int) -> dict[str, tuple[int, ...]]:
    hidden, mlp = dims.hidden_size, dims.intermediate_size
    width, kv_width = dims.num_attention_heads * dims.head_dim, dims.num_key_value_heads * dims.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (dims.vocab_size, hidden), "norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (dims.head_dim,) for name in "qk"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (kv_width, hidden) for name in "kv"}
        shapes |= {f"{at}.self_attn.q_proj.weight": (width, hidden), f"{at}.self_attn.o_proj.weight": (hidden, width)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, mlp)}
    return shapes


def _weight(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[ml_dtypes.bfloat16]:
    """Norm weights have a mean of 1, matrices a mean of 0."""
    numbers = random.standard_normal(shape, np.float32)
    return (numbers * 0.03 if len(shape) > 1 else 1 + numbers * 0.2).astype(ml_dtypes.bfloat16)
