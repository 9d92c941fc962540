"""Checkpoints: one reader for each format, all of which return the same `Checkpoint`.

readers/  recognize a format and describe what it holds: `open_checkpoint`
files/    the files of a checkpoint, and their headers
tensors/  what is stored in them: places, encodings, parameter names
loading/  reads the tensors: `load_weights` into a model, `convert_checkpoint` into a new folder

The path of a checkpoint, from a model's name to weights in memory:

readers/registry.py          the first reader that recognizes the name opens it; what none does is fetched from the hub
files/, a header             every array as a `StoredArray`: file, offset, dtype, shape
tensors/keys.py              which of them are the encoder's, whatever stands before their names
tensors/assemble.py          the arrays of each module as one `StoredTensor`, under the parameter's name
qwen3/config.py              the dims of config.json; without one readers/theta.py finds them, and rope_theta
files/tokenizer_files.py     the tokenizer: named by the user, in the checkpoint, beside it, or Qwen3's own
checkpoint.py, `describe`    all of it as a `Checkpoint`. No tensor has been read
tensors/expected.py          compares the tensors with the dims
readers/loras.py             the arrays of LoRAs join those of the tensors that they change
loading/load.py              fills the model with them
loading/residency.py         which form each takes in memory; memory.py: whether all of them fit
loading/parameters.py        reads one after the other, with array_reader.py, and decodes or quantizes it
"""

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.convert import convert_checkpoint
from encoder.checkpoint.loading.load import load_weights
from encoder.checkpoint.readers.registry import open_checkpoint

__all__ = ["Checkpoint", "convert_checkpoint", "load_weights", "open_checkpoint"]
