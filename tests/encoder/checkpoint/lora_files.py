"""Writes LoRAs under the names of their trainers, and computes in float64 what they make of the weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.checkpoints import Array, write_json
from tests.encoder.checkpoint.gguf_files import NAMES

RANK, ALPHA = 4, 6.0
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
Pairs = dict[str, tuple[Array, Array]]  # by the module's path: up (rows, rank) and down (rank, columns)


def make_pairs(weights: Mapping[str, Array], modules: tuple[str, ...] = MODULES, seed: int = 1) -> Pairs:
    """Random matrices for modules of every layer, so large that they change every hidden state."""
    random = np.random.default_rng(seed)
    pairs = {}
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        if path.endswith(modules):
            rows, columns = weight.shape
            up, down = random.standard_normal((rows, RANK)), random.standard_normal((RANK, columns)) / columns**0.5
            pairs[path] = (up.astype(np.float32) / 2, down.astype(np.float32))
    return pairs


def merged(weights: Mapping[str, Array], pairs: Pairs, factor: float) -> dict[str, Array]:
    """The weights with the pairs merged in float64, by parameter name."""
    changed = {name: weight.astype(np.float64) for name, weight in weights.items()}
    for path, (up, down) in pairs.items():
        changed[f"{path}.weight"] += factor * (up.astype(np.float64) @ down.astype(np.float64))
    return changed


def peft(pairs: Pairs, prefix: str = "base_model.model.model.", adapter: str = "") -> dict[str, Array]:
    """As PEFT names them; with `adapter`, as its own state dict does."""
    middle = f".{adapter}" if adapter else ""
    return {
        f"{prefix}{path}.lora_{part}{middle}.weight": array
        for path, (up, down) in pairs.items()
        for part, array in (("A", down), ("B", up))
    }


def kohya(
    pairs: Pairs, prefix: str = "lora_te_", alpha: float | None = ALPHA, dtype: Any = np.float32
) -> dict[str, Array]:
    """As sd-scripts names them, with an alpha for each module."""
    tensors: dict[str, Array] = {}
    for path, (up, down) in pairs.items():
        name = prefix + path.replace(".", "_")
        tensors |= {f"{name}.lora_up.weight": up.astype(dtype), f"{name}.lora_down.weight": down.astype(dtype)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, dtype)
    return tensors


def dotted(up_name: str, down_name: str, prefix: str = "text_encoder.model.") -> Callable[[Pairs], dict[str, Array]]:
    """Pairs under dotted names with these ends."""
    return lambda pairs: {
        f"{prefix}{path}{end}": array
        for path, (up, down) in pairs.items()
        for end, array in ((up_name, up), (down_name, down))
    }


def mlx_lm(pairs: Pairs) -> dict[str, Array]:
    return {
        f"model.{path}.{name}": array.T
        for path, (up, down) in pairs.items()
        for name, array in (("lora_a", down), ("lora_b", up))
    }


def write_gguf_lora(file: Path, pairs: Pairs, alpha: float = ALPHA, **metadata: str) -> Path:
    """As llama.cpp's convert_lora_to_gguf.py writes it. A pair of the embedding is stored as A and B transposed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, metadata.pop("architecture", "qwen3"))
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **metadata}.items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", alpha)
    for path, (up, down) in pairs.items():
        key = NAMES.get_name(f"model.{path}")
        a, b = (up, down.T) if path == "embed_tokens" else (down, up)
        writer.add_tensor(f"{key}.weight.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{key}.weight.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_lora(
    file: Path, tensors: Mapping[str, Array], config: Mapping[str, Any] | None = None, **metadata: str
) -> Path:
    """Write a file, and an adapter_config.json beside it where there is one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, file, metadata or None)
    if config is not None:
        write_json(file.parent / "adapter_config.json", config)
    return file


def write_peft(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    """Write a folder as PEFT saves it."""
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "Qwen/Qwen3-4B"}
    write_lora(folder / "adapter_model.safetensors", tensors, fields | config)
    return folder


def as_bfloat16(pairs: Pairs) -> Pairs:
    """The pairs rounded to bfloat16, which a file then holds exactly."""
    return {
        path: (up.astype(ml_dtypes.bfloat16), down.astype(ml_dtypes.bfloat16)) for path, (up, down) in pairs.items()
    }
