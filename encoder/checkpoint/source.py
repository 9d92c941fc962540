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
    folder = os.path.expanduser(source)
    if source == "demo":
        checkpoint = open_folder(demo.write_demo(cache_dir), name=source)
    elif os.path.isdir(folder):
        checkpoint = open_folder(Path(folder), name=source)
    elif hub.is_hub_id(source):
        checkpoint = hub.open_repository(source, revision=revision, cache_dir=cache_dir)
    elif os.path.isfile(folder):
        raise CheckpointError(
            f"{source}: is a file, expected the folder with config.json, the weights and tokenizer.json."
        )
    else:
        raise CheckpointError(
            f"{source!r}: no such folder, and not a hub id like Qwen/Qwen3-0.6B. "
            f"Give the folder of a checkpoint, a hub id, or 'demo'."
        )
    if checkpoint.random_weights:
        log.warning("%s: the weights of this checkpoint are RANDOM; its hidden states mean nothing.", source)
    return checkpoint
