"""Writes an Ollama store, after its documentation."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from tests.checkpoints import Array, quantize_with_mlx, write_checkpoint, write_tensors

DIMS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "dtype": "bfloat16"}
TENSOR, JSON = "application/vnd.ollama.image.tensor", "application/vnd.ollama.image.json"
TYPES: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32},
    "int8": {"bits": 8, "group_size": 64},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
}


class Store:
    """An Ollama store in a folder of its own, and a plain checkpoint with the same numbers beside it."""

    def __init__(self, root: Path) -> None:
        self.root, self.plain = root / "models", root / "plain"
        self.layers: list[dict[str, Any]] = []
        self.weights = write_checkpoint(self.plain, **DIMS)
        self.component = "text_encoder/"

    def add(self, media_type: str, name: str, content: bytes) -> Path:
        digest = hashlib.sha256(content).hexdigest()
        blob = self.root / "blobs" / f"sha256-{digest}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        self.layers.append({"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content), "name": name})
        return blob

    def add_json(self, tokenizer: str = "tokenizer/") -> None:
        self.add(JSON, f"{self.component}config.json", (self.plain / "config.json").read_bytes())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            self.add(JSON, tokenizer + name, (self.plain / name).read_bytes())

    def add_tensor(self, key: str, parts: dict[str, Array], quant_type: str | None, era: str) -> None:
        """One weight: `parts` are its arrays, under "", "scale", and perhaps "bias"."""
        full = self.component + key
        if era == "three-blobs":
            suffixes = {"": "", "scale": "_scale", "bias": "_qbias"}
            for part, array in parts.items():
                self.add(TENSOR, full + suffixes[part], save({"data": array}))
        elif quant_type is None:
            self.add(TENSOR, full, save({key: parts[""]}))
        else:
            metadata = {"quant_type": quant_type, "group_size": str(TYPES[quant_type]["group_size"])}
            self.add(TENSOR, full, save({f"{full}.{p}" if p else full: array for p, array in parts.items()}, metadata))

    def add_weights(self, types: Callable[[str], str | None], era: str) -> None:
        """All weights, each quantized to the type that `types` gives for its name; None leaves it plain."""
        decoded: dict[str, Array] = {}
        for name, weight in self.weights.items():
            quant_type = types(name)
            if quant_type is None or weight.ndim == 1 or "embed" in name:
                decoded[name] = weight
                self.add_tensor(f"model.{name}", {"": weight.astype(ml_dtypes.bfloat16)}, None, era)
                continue
            stored, values = quantize_with_mlx({name: weight}, TYPES[quant_type])
            decoded |= values
            named = {name: "", name.replace(".weight", ".scales"): "scale", name.replace(".weight", ".biases"): "bias"}
            self.add_tensor(f"model.{name}", {named[key]: stored[key] for key in stored}, quant_type, era)
        write_tensors(self.plain, {f"model.{name}": array.astype(np.float32) for name, array in decoded.items()})

    def write_manifest(self, name: str = "registry.ollama.ai/library/z-image-turbo/latest") -> Path:
        manifest = self.root / "manifests" / name
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": self.layers}))
        return manifest
