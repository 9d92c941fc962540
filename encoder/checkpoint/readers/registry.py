"""From a model's name to its checkpoint: which readers there are, and in which order they are asked."""

import logging
import os
import re
from dataclasses import replace
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.hub_files import fetch
from encoder.checkpoint.files.hub_id import HubId
from encoder.checkpoint.files.lookalikes import explain_lookalike
from encoder.checkpoint.files.lora_file import expect_no_adapter
from encoder.checkpoint.files.unreadable import unreadable
from encoder.checkpoint.readers import comfyui, demo, gguf, huggingface, ollama
from encoder.checkpoint.readers.loras import merge_loras
from encoder.checkpoint.readers.reader import Reader
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.expected import check_tensors
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from encoder.qwen3.depth import choose_depth
from encoder.regular_file import open_file

log = logging.getLogger(__name__)

# The first reader that recognizes the source opens it. Where none does, the source may be a hub id: the repository is
# fetched, and the same readers are asked about the folder or file that was fetched.
READERS: tuple[Reader, ...] = (demo, huggingface, comfyui, gguf, ollama)


def open_checkpoint(options: ModelOptions) -> Checkpoint:
    """Describe the checkpoint that `options.model` names, and log its warnings.

    Reads headers, no tensors; downloads what is on the hub. All that the options ask for is there: no tensor of the
    layers to load is missing, misshapen or too much.

    Errors: CheckpointError saying what was looked for, or what is wrong with what was found.
    """
    request = Request(options.model, options)
    try:
        checkpoint = _open(request)
        depth = choose_depth(checkpoint.config, options.num_layers, options.presets)
        check_tensors(
            checkpoint.weights.tensors, checkpoint.config, depth.layers, options.model, checkpoint.origin.config
        )
        checkpoint = merge_loras(checkpoint, options)
    except OSError as error:
        raise unreadable(Path(error.filename or options.model), error) from error
    log.info("%s: its tokenizer is %s", options.model, checkpoint.origin.tokenizer)
    for warning in checkpoint.warnings:
        log.warning("%s: %s", options.model, warning)
    return checkpoint


def _open(request: Request) -> Checkpoint:
    # os.path.exists, because Path.exists raises for names that are too long.
    if request.source and os.path.exists(request.path) and not request.is_folder:
        open_file(request.path).close()  # of a pipe or a device each reader would say that there is no such file
    expect_no_adapter(request.path, request.name)
    reader = _find_reader(request)
    if reader is None:
        return _open_from_hub(request)
    if request.options.revision is not None:
        raise CheckpointError(
            f"{request.name}: is no hub repository, so it has no revision {request.options.revision!r}. Leave that out."
        )
    return reader.open_request(request)


def _find_reader(request: Request) -> Reader | None:
    return next((reader for reader in READERS if reader.recognizes(request)), None)


def _open_from_hub(request: Request) -> Checkpoint:
    hub_id = _parse_hub_id(request)
    snapshot = fetch(hub_id, request.options.cache_dir, request.options.component)
    fetched = replace(request, source=str(snapshot / hub_id.path))
    expect_no_adapter(fetched.path, request.name)
    reader = _find_reader(fetched)
    if reader is None:
        raise CheckpointError(f"{request.name}: has no such file or folder, or it is of no known format.")
    return replace(reader.open_request(fetched), revision=snapshot.name)


def _explain_file(file: Path) -> str:
    """What a file is that no reader takes, and what to give in its place."""
    if file.suffix == ".json":
        return f"describes a part of a model. Give the folder of the model, as {file.parent} may be."
    return explain_lookalike(file) or "is a file of no known format. Give a *.safetensors or *.gguf file, or a folder."


def _parse_hub_id(request: Request) -> HubId:
    """The hub id that the source is, at the revision that was asked for."""
    hub_id, revision = HubId.parse(request.source), request.options.revision
    if hub_id is None:
        if os.path.isfile(request.path):
            raise CheckpointError(f"{request.path}: {_explain_file(request.path)}")
        found = "no such folder or file"
        if request.source != request.source.strip(" \t\r\n\"'"):
            found = "has quotes or blanks around it; so written it is no such folder or file"
        if "://" in request.source:
            found = "is an address, but not of a model on the hub, like https://huggingface.co/Qwen/Qwen3-0.6B"
        shown = re.sub("//[^/]*@", "//", request.source)  # an address may hold a token
        raise CheckpointError(
            f"{shown!r:.300}: {found}, and not a hub id like Qwen/Qwen3-0.6B. "
            f"Give the folder of a checkpoint, a *.safetensors or *.gguf file, a hub id, an Ollama name, or 'demo'."
        )
    if revision and hub_id.revision and revision != hub_id.revision:
        raise CheckpointError(f"{request.name}: names one revision and {revision!r} is another. Give one of them.")
    return replace(hub_id, revision=revision or hub_id.revision)
