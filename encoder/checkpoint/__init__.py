"""Checkpoints: one reader for each format, all of which return the same `Checkpoint`.

readers/  recognize a format and describe what it holds: `open_checkpoint`
files/    the files of a checkpoint, and their headers
tensors/  what is stored in them: places, encodings, parameter names
loading/  reads the tensors: `load_weights` into a model, `convert_checkpoint` into a new folder

No tensor is read before one of these two is called.
"""

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.convert import convert_checkpoint
from encoder.checkpoint.loading.load import check_weights, load_weights
from encoder.checkpoint.readers.registry import open_checkpoint

__all__ = ["Checkpoint", "check_weights", "convert_checkpoint", "load_weights", "open_checkpoint"]
