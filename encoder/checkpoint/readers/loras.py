"""Merges adapters into a checkpoint that is open: `--lora`, and the adapters in Ollama's manifests.

The arrays of an adapter join those of the tensors that they change, so whatever reads, counts or compares stored
tensors takes them into account.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.hub_files import fetch_adapter
from encoder.checkpoint.files.lora_file import Adapter, open_adapter
from encoder.checkpoint.files.lora_updates import find_updates
from encoder.checkpoint.tensors.fingerprint import fingerprint
from encoder.checkpoint.tensors.lora import merge
from encoder.checkpoint.tensors.weights import Weights
from encoder.errors import CheckpointError
from encoder.options import Lora
from encoder.types import MergedLora

log = logging.getLogger(__name__)


def merge_loras(checkpoint: Checkpoint, loras: Sequence[Lora], cache_dir: Path | None) -> Checkpoint:
    """The checkpoint with LoRAs merged, in this order. Reads headers, and of the arrays only alpha.

    Errors: CheckpointError for a LoRA that is missing or damaged, of an unknown kind, or made for another model.
    """
    for lora in loras:
        adapter = open_adapter(_locate(lora.source, cache_dir))
        checkpoint = merge_adapter(checkpoint, adapter, lora)
    return checkpoint


def merge_adapter(checkpoint: Checkpoint, adapter: Adapter, lora: Lora) -> Checkpoint:
    """The checkpoint with one adapter merged. Errors: as of `merge_loras`."""
    tensors = dict(checkpoint.weights.tensors)
    updates = find_updates(adapter, tensors, lora.scale, checkpoint.name)
    for (name, _), update in updates.items():
        tensors[name] = merge(tensors[name], [update])
    changed = len({name for name, _ in updates})
    log.info("%s: merged into %d weights of %s, at scale %g", lora.source, changed, checkpoint.name, lora.scale)
    return replace(
        checkpoint,
        weights=Weights(tensors, _check_other_files(checkpoint.weights, adapter.file)),
        fingerprint=fingerprint(checkpoint.config, tensors),
        loras=(*checkpoint.loras, MergedLora(lora.source, lora.scale, changed)),
    )


def _locate(source: str, cache_dir: Path | None) -> Path:
    """Where an adapter is: a folder or file here, else in the snapshot of a hub repository."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    fetched = fetch_adapter(source, cache_dir)
    if fetched is None:
        raise CheckpointError(
            f"--lora {source!r:.200}: no such folder or file, and not a hub id. Give a folder with "
            f"adapter_model.safetensors, a *.safetensors file, or a hub id like organization/name/file.safetensors."
        )
    return fetched


def _check_other_files(weights: Weights, adapter: Path) -> Callable[[Path], None]:
    """What the checkpoint checks of its files, for all but the adapter's: a blob of Ollama has its hash for a name."""
    return lambda file: None if file == adapter else weights.check_file(file)
