"""Identifies the content of a checkpoint's weights by a short digest."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from encoder.checkpoint.tensors.weights import StoredTensor
from encoder.qwen3.config import Qwen3Config

# These dims do not change a hidden state, and differ between copies of the same model.
_IRRELEVANT = ("max_position_embeddings", "tie_word_embeddings")
# Absent where it is None, so that results which were stored before there was such a dim are still found.
_OPTIONAL = ("rope_scaling",)


def fingerprint(config: Qwen3Config, tensors: Mapping[str, StoredTensor]) -> str:
    """32 hex digits of the dims, and of each tensor's name, encoding, and a sample of the bytes of its arrays.

    Files, paths and key prefixes do not enter. Reads 2 KiB of each array.
    """
    digest = hashlib.sha256()
    digest.update(repr(sorted(_relevant(config).items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.encoding.label, tensor.shape)).encode())
        for role, array in sorted(tensor.arrays.items()):
            digest.update(repr((role, array.dtype, array.shape)).encode())
            digest.update(array.sample())
    return digest.hexdigest()[:32]


def _relevant(config: Qwen3Config) -> dict[str, Any]:
    dims = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT}
    return {name: value for name, value in dims.items() if value is not None or name not in _OPTIONAL}
