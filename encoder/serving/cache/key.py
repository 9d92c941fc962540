"""Names a result by everything that changes it, so that a result on disk can never be stale."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from encoder.qwen3.plain import PlainForward
from encoder.text_encoder import TextEncoder
from encoder.types import Job

# Fields of ModelInfo that change no number: where the model is from, and how much of it is loaded.
_IRRELEVANT = ("model", "revision", "origin", "warnings", "parameter_bytes", "num_layers")


def model_identity(encoder: TextEncoder) -> str:
    """A digest of the loaded weights, of how they compute, and of the code: 64 hex digits.

    The fingerprint covers a sample of each array, so the sizes and times of the files are included: a file that was
    edited or rewritten is another model. Paths are not included.

    Errors: OSError when a file is gone.
    """
    checkpoint = encoder.checkpoint
    arrays = [array for tensor in checkpoint.weights.tensors.values() for array in tensor.arrays.values()]
    files = [file.stat() for file in {array.file for array in arrays}]
    loaded = {name: value for name, value in asdict(encoder.info).items() if name not in _IRRELEVANT}
    if encoder.forward.name != PlainForward.name:
        del loaded["blas"]  # only the plain pass multiplies with it
    parts = {
        "loaded": loaded,
        "files": sorted((file.st_size, file.st_mtime_ns) for file in files),
        "tf32": os.environ.get("MLX_ENABLE_TF32"),  # MLX then computes float32 products with 10 bits of mantissa
        "code": _code_digest(),
    }
    return _digest(parts)


def result_key(identity: str, job: Job) -> str:
    """A digest of a model and all fields of a job: 64 hex digits."""
    return _digest([identity, asdict(job)])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """A digest of all sources of this package, so that there is no version number to remember."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[2].rglob("*")):
        if file.suffix in (".py", ".c", ".h", ".cuh"):
            digest.update(file.read_bytes())
    return digest.hexdigest()
