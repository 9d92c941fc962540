"""Names a result by everything that changes it, so that what outlives the process can never be stale."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from encoder.text_encoder import TextEncoder
from encoder.types import Job

# Of ModelInfo: where the model is from and how much of it is loaded change no number.
_IRRELEVANT = ("model", "revision", "parameter_bytes", "num_layers")


def model_identity(encoder: TextEncoder) -> str:
    """64 hex digits made of the loaded weights, how they compute, and the code that does it.

    The fingerprint has a sample of each array, so the files' sizes and times stand beside it: a file that was edited,
    or written again, is another model. Paths do not enter. Errors: OSError when a file is gone.
    """
    checkpoint = encoder.checkpoint
    arrays = [array for tensor in checkpoint.weights.tensors.values() for array in tensor.arrays.values()]
    files = [file.stat() for file in {array.file for array in arrays}]
    parts = {
        "loaded": {name: value for name, value in asdict(encoder.info).items() if name not in _IRRELEVANT},
        "files": sorted((file.st_size, file.st_mtime_ns) for file in files),
        "pad_token_id": checkpoint.tokenizer.pad_token_id,  # what live padding rows are made of
        "tf32": os.environ.get("MLX_ENABLE_TF32"),  # read by MLX: float32 products with 10 bits of mantissa
        "code": _code_digest(),
    }
    return _digest(parts)


def result_key(identity: str, job: Job) -> str:
    """64 hex digits made of a model and all fields of a job."""
    return _digest([identity, asdict(job)])


def _digest(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """Changes with any source file of this package: nobody has to remember to count a version up."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[2].rglob("*")):
        if file.suffix in (".py", ".c", ".h", ".cuh"):
            digest.update(file.read_bytes())
    return digest.hexdigest()
