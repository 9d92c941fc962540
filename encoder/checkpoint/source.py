"""From what the user typed to a checkpoint: which reader is asked, and in which order."""

import logging
import os
from pathlib import Path

from encoder.checkpoint import demo, hub
from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.huggingface import open_folder
from encoder.errors import CheckpointError

log = logging.getLogger(__name__)


def open_checkpoint(source: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Checkpoint:
    """Describe the checkpoint that `source` means; reads headers, no tensors. Downloads it when it is on the hub.

    Args:
        source: "demo", a folder, or a hub id as `organization/name` or `organization/name@revision`.
        revision: branch, tag or commit of a hub repository.
        cache_dir: where downloads and the demo go; None means each in its usual place.
    Errors: CheckpointError saying what was looked for, or what is wrong with what was found.
    """
    try:
        checkpoint = _open(source, revision, cache_dir)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error}") from error
    if checkpoint.random_weights:
        log.warning("%s: the weights of this checkpoint are RANDOM; its hidden states mean nothing.", source)
    return checkpoint


def _open(source: str, revision: str | None, cache_dir: Path | None) -> Checkpoint:
    folder = os.path.expanduser(source)
    is_here = source == "demo" or os.path.isdir(folder)
    if is_here and revision is not None:
        raise CheckpointError(f"{source}: is no hub repository, so it has no revision {revision!r}. Leave that out.")
    if source == "demo":
        return open_folder(demo.write_demo(cache_dir), name=source)
    if is_here:
        return open_folder(Path(folder), name=source)
    if hub.is_hub_id(source):
        return hub.open_repository(source, revision=revision, cache_dir=cache_dir)
    if os.path.isfile(folder):
        raise CheckpointError(f"{source}: is a file, expected the folder with config.json, weights and tokenizer.json.")
    raise CheckpointError(
        f"{source!r}: no such folder, and not a hub id like Qwen/Qwen3-0.6B. "
        f"Give the folder of a checkpoint, a hub id, or 'demo'."
    )
