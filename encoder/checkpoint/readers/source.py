"""From what the user typed to a checkpoint: which readers there are, and in which order they are asked."""

import logging
import os

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.readers import demo, hub, ollama
from encoder.checkpoint.readers.formats import FORMATS
from encoder.checkpoint.request import Reader, Request
from encoder.errors import CheckpointError
from encoder.options import ModelOptions

log = logging.getLogger(__name__)

READERS: tuple[Reader, ...] = (demo, *FORMATS, ollama, hub)  # what is here goes before what must be fetched


def open_checkpoint(options: ModelOptions) -> Checkpoint:
    """Describe the checkpoint that `options.model` names. Reads headers, no tensors; downloads what is on the hub.

    Errors: CheckpointError saying what was looked for, or what is wrong with what was found.
    """
    request = Request(options.model, options)
    try:
        checkpoint = _reader_of(request).open_request(request)
    except OSError as error:
        raise CheckpointError(f"{options.model}: cannot be read: {error}") from error
    if checkpoint.random_weights:
        log.warning("%s: the weights of this checkpoint are RANDOM; its hidden states mean nothing.", options.model)
    return checkpoint


def _reader_of(request: Request) -> Reader:
    for reader in READERS:
        if reader.recognizes(request):
            if request.options.revision is not None and reader is not hub:
                raise CheckpointError(
                    f"{request.source}: is no hub repository, so it has no revision {request.options.revision!r}. "
                    f"Leave that out."
                )
            return reader
    raise CheckpointError(
        f"{request.source!r}: {_found(request)}, and not a hub id like Qwen/Qwen3-0.6B. "
        f"Give the folder of a checkpoint, a *.safetensors or *.gguf file, a hub id, an Ollama name, or 'demo'."
    )


def _found(request: Request) -> str:
    return "is a file of no known format" if os.path.isfile(request.path) else "no such folder or file"
