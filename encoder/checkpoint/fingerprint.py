"""A short name for the content of a checkpoint's weights."""

import hashlib
from dataclasses import asdict

from encoder.checkpoint.weights import Weights
from encoder.config import Qwen3Config

# They do not change a hidden state, and differ between copies of the same model.
_IRRELEVANT = ("max_position_embeddings", "tie_word_embeddings")


def fingerprint(config: Qwen3Config, weights: Weights) -> str:
    """32 hex digits made of the dims, and each tensor's name, dtype, shape and a sample of its bytes.

    Files, paths and key prefixes do not enter. Costs two reads of a KiB for each tensor.
    """
    digest = hashlib.sha256()
    dims = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT}
    digest.update(repr(sorted(dims.items())).encode())
    for name, tensor in sorted(weights.tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
        digest.update(weights.sample(tensor))
    return digest.hexdigest()[:32]
