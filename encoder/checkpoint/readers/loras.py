"""Merges adapters into a checkpoint that is open: `--lora`, and the adapters in Ollama's manifests.

The arrays of an adapter join those of the tensors that they change, so whatever reads, counts or compares stored
tensors takes them into account.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.hub_files import fetch_adapter
from encoder.checkpoint.files.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILES
from encoder.checkpoint.files.lora_file import Adapter, find_adapter, open_adapter
from encoder.checkpoint.files.lora_updates import find_updates
from encoder.checkpoint.readers.gguf_adapter import open_gguf_adapter
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.fingerprint import fingerprint
from encoder.checkpoint.tensors.lora import merge
from encoder.checkpoint.tensors.weights import Weights
from encoder.errors import CheckpointError
from encoder.options import Lora, ModelOptions
from encoder.types import MergedLora

log = logging.getLogger(__name__)


def merge_loras(checkpoint: Checkpoint, options: ModelOptions) -> Checkpoint:
    """The checkpoint with the options' LoRAs merged, in this order. Reads headers, and of the arrays only alpha.

    Warns of a LoRA that lies beside the model and is not among them.

    Errors: CheckpointError for a LoRA that is missing or damaged, of an unknown kind, or made for another model.
    """
    beside = _adapters_beside(checkpoint)
    for lora in options.loras:
        file = find_adapter(_locate(lora.source, options))
        is_gguf = Request(str(file), options).is_file(".gguf")
        adapter = open_gguf_adapter(file) if is_gguf else open_adapter(file)
        checkpoint = merge_adapter(checkpoint, adapter, lora)
        beside.discard(adapter.file.parent.resolve())
    unapplied = [f"{folder} holds a LoRA that is not applied; --lora {folder} merges it" for folder in sorted(beside)]
    return replace(checkpoint, warnings=(*checkpoint.warnings, *unapplied))


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter, lora: Lora) -> Checkpoint:
    """The checkpoint with one adapter merged. Errors: as of `merge_loras`."""
    tensors = dict(checkpoint.weights.tensors)
    updates = find_updates(adapter, tensors, lora.scale, checkpoint.name)
    for (name, _), update in updates.by_target.items():
        tensors[name] = merge(tensors[name], [update])
    changed = len({name for name, _ in updates.by_target})
    log.info("%s: merged into %d weights of %s, at scale %g", lora.source, changed, checkpoint.name, lora.scale)
    return replace(
        checkpoint,
        weights=Weights(tensors, _check_other_files(checkpoint.weights, adapter.file)),
        fingerprint=fingerprint(checkpoint.config, tensors),
        loras=(*checkpoint.loras, MergedLora(lora.source, lora.scale, changed)),
        warnings=(*checkpoint.warnings, *updates.warnings),
    )


def _adapters_beside(checkpoint: Checkpoint) -> set[Path]:
    """The folders of the model's files that also hold a LoRA."""
    folders = {tensor.file.parent for tensor in checkpoint.weights.tensors.values()}
    names = (ADAPTER_CONFIG_FILE, *ADAPTER_FILES)
    return {folder.resolve() for folder in folders if any((folder / name).is_file() for name in names)}


def _locate(source: str, options: ModelOptions) -> Path:
    """Where an adapter is: a folder or file here, else in the snapshot of a hub repository."""
    path = Request(source, options).path
    if source and os.path.exists(path):  # Path.exists raises for names that are too long
        return path
    fetched = fetch_adapter(source, options.cache_dir)
    if fetched is None:
        raise CheckpointError(
            f"--lora {source!r:.200}: no such folder or file, and not a hub id. Give a folder with "
            f"adapter_model.safetensors, a *.safetensors file, or a hub id like organization/name/file.safetensors."
        )
    return fetched


def _check_other_files(weights: Weights, adapter: Path) -> Callable[[Path], None]:
    """What the checkpoint checks of its files, for all but the adapter's: a blob of Ollama has its hash for a name."""
    return lambda file: None if file == adapter else weights.check_file(file)
