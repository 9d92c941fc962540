"""Which folders and files a checkpoint consists of, in the file system and in a hub repository.

Reads the index of sharded weights, and opens nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.tensors.keys import parameter_name
from encoder.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"  # where the weights are in one file
INDEX_FILE = "model.safetensors.index.json"  # where they are in several
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
PIPELINE_FILE = "model_index.json"  # of a diffusers pipeline
ADAPTER_CONFIG_FILE = (
    "adapter_config.json"  # of a LoRA in a folder, beside the first of the next or mlx-lm's, the second
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")

TEXT_ENCODER_FOLDER = "text_encoder"  # of a diffusers pipeline, as are the next
TOKENIZER_FOLDERS = ("tokenizer", "processor")

MODEL_SUFFIXES = (".safetensors", ".gguf")  # of checkpoints in a single file; a hub id may end in one


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of a checkpoint: that of its config.json and weights, and that of its tokenizer.json."""

    text_encoder: Path
    tokenizer: Path


def find_layout(folder: Path) -> Layout:
    """Where text encoder and tokenizer are, in a diffusers pipeline and in the folder of a single model.

    Errors: CheckpointError for a pipeline without a text encoder.
    """
    inner = folder / TEXT_ENCODER_FOLDER
    if (folder / PIPELINE_FILE).is_file() or (inner / CONFIG_FILE).is_file() or any(inner.glob("*.safetensors")):
        if not inner.is_dir():
            raise CheckpointError(
                f"{folder}: this diffusers pipeline has no text_encoder folder. "
                f"Name the Qwen3 checkpoint that it was published to go with."
            )
        text_encoder, candidates = inner, [*(folder / name for name in TOKENIZER_FOLDERS), inner]
    else:
        text_encoder, candidates = folder, [folder, *(folder.parent / name for name in TOKENIZER_FOLDERS)]
    return Layout(text_encoder, first_with_tokenizer(candidates) or candidates[0])


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer.json in `folder`."""
    return (folder / TOKENIZER_FILE).is_file()


def first_with_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The first of `folders` that has a tokenizer.json, None if no folder has one."""
    return next(filter(has_tokenizer, folders), None)


def read_index(file: Path) -> dict[str, str]:
    """From the keys of the encoder's tensors to the names of the files that hold them.

    Errors: CheckpointError when the index is damaged, or names a file outside its own folder.
    """
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is no map of tensors to files, or empty.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or "\\" in name:
            raise CheckpointError(f"{file}: {key} is in {name!r}, expected the name of a file beside it.")
    return {key: name for key, name in weight_map.items() if parameter_name(key) is not None}
