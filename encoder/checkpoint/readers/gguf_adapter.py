"""Reads a LoRA in a GGUF file, as llama.cpp's convert_lora_to_gguf.py writes it and Ollama keeps it.

Its arrays are named after the model's: `blk.0.attn_q.weight.lora_a`. Those of the embedding have other orders than
those of a matrix.
Source: llama.cpp, src/llama-adapter.cpp, convert_lora_to_gguf.py.
"""

from dataclasses import replace
from pathlib import Path

from encoder.checkpoint.files.gguf_header import read_gguf_header
from encoder.checkpoint.files.lora_file import Adapter
from encoder.checkpoint.files.lora_scaling import Scaling
from encoder.checkpoint.readers.gguf import ARCHITECTURES, parameter_name
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError


def open_gguf_adapter(file: Path) -> Adapter:
    """Open a LoRA in a GGUF file of any name.

    Errors: CheckpointError when it is damaged, no LoRA, or made for another architecture.
    """
    header = read_gguf_header(file)
    expected = {"general.type": ("adapter",), "adapter.type": ("lora",), "general.architecture": ARCHITECTURES}
    for key, values in expected.items():
        found = header.metadata.get(key)
        if found not in values:
            raise CheckpointError(
                f"{file}: {key} is {found!r:.80}, expected {' or '.join(values)}, for a LoRA of Qwen3."
            )
    if "adapter.alora.invocation_tokens" in header.metadata:
        raise CheckpointError(f"{file}: is an activated LoRA, which acts from some tokens on. It is not read.")
    alpha = header.metadata.get("adapter.lora.alpha")
    scaling = Scaling(alpha=float(alpha)) if isinstance(alpha, float) and alpha else Scaling()
    return Adapter(file, [_renamed(array) for array in header.arrays], scaling)


def _renamed(array: StoredArray) -> StoredArray:
    """The array under the name of the parameter that it changes."""
    key, _, part = array.key.rpartition(".lora_")
    return replace(array, key=f"{parameter_name(key) or key}.lora_{part}")
