"""Checkpoints: one reader per format and one per place, all yielding the same `Checkpoint`.

Nothing here reads a tensor before `load_weights` is called.
"""

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.convert import convert_checkpoint
from encoder.checkpoint.loading.load import check_weights, load_weights
from encoder.checkpoint.readers.registry import open_checkpoint

__all__ = ["Checkpoint", "check_weights", "convert_checkpoint", "load_weights", "open_checkpoint"]
