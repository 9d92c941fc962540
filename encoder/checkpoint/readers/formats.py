"""The readers of what lies in the file system, wherever it came from."""

from dataclasses import replace
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.readers import comfyui, huggingface
from encoder.checkpoint.readers import gguf as gguf_reader
from encoder.checkpoint.request import Reader, Request
from encoder.errors import CheckpointError

FORMATS: tuple[Reader, ...] = (huggingface, comfyui, gguf_reader)


def open_path(path: Path, request: Request) -> Checkpoint:
    """Describe the checkpoint at `path`; its name is the one that the user gave.

    Errors: CheckpointError when no format recognizes it, or it is damaged.
    """
    there = replace(request, source=str(path))
    for reader in FORMATS:
        if reader.recognizes(there):
            return reader.open_request(there)
    raise CheckpointError(f"{request.name}: has no such file or folder, or it is of no known format.")
