"""Reads a single safetensors file, as ComfyUI's folder models/text_encoders holds them.

The dims follow from the shapes, unless a config.json of the same model lies beside the file or in a folder of its name.
Source: ComfyUI, comfy/sd.py:detect_te_model, comfy/text_encoders/llama.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    SHARD_NAME,
    TOKENIZER_FOLDERS,
    WEIGHTS_FILE,
    is_there,
    read_index,
)
from encoder.checkpoint.files.safetensors_header import Header, read_header
from encoder.checkpoint.readers.huggingface import open_folder
from encoder.checkpoint.readers.safetensors import Files, open_files
from encoder.checkpoint.request import Request

_PLACES = ("", *TOKENIZER_FOLDERS)  # of a tokenizer, in the file's folder and in the one above
_NORM = ".input_layernorm.weight"  # of a decoder layer; it has hidden_size numbers, and is never quantized


def recognizes(request: Request) -> bool:
    """A file whose name ends in .safetensors."""
    return request.is_file(".safetensors")


def open_request(request: Request) -> Checkpoint:
    """Describe the checkpoint in a file, or the whole folder's where the file is a part of a Hugging Face folder.

    Errors: CheckpointError naming the file and what is wrong with it.
    """
    file, folder = request.path, request.path.parent
    if _is_part(file, folder):
        return open_folder(folder, request)
    header = read_header(file)
    config_file, warnings = _config_beside([file.with_suffix(""), folder], header)
    files = Files(
        where=file,
        headers=[header],
        config_file=config_file,
        tokenizers=[file.with_suffix(""), *(place / name for place in (folder, folder.parent) for name in _PLACES)],
        component=request.options.component,
        format="safetensors file",
        warnings=warnings,
    )
    return open_files(files, request)


def _is_part(file: Path, folder: Path) -> bool:
    """Whether the file is the model of a folder, or one of its shards."""
    if SHARD_NAME.fullmatch(file.name):
        return True
    if not is_there(folder / CONFIG_FILE):
        return False
    return file.name == WEIGHTS_FILE or ((folder / INDEX_FILE).is_file() and file.name in _indexed(folder))


def _indexed(folder: Path) -> set[str]:
    return set(read_index(folder / INDEX_FILE).values())


def _config_beside(folders: Sequence[Path], header: Header) -> tuple[Path | None, tuple[str, ...]]:
    """The first config.json in these folders that is of the same model; a warning where there are only others."""
    found = [folder / CONFIG_FILE for folder in folders if (folder / CONFIG_FILE).is_file()]
    own = next((config_file for config_file in found if _describes(config_file, header)), None)
    others = () if own else tuple(f"{config_file} is of another model, and is not used" for config_file in found)
    return own, others


def _describes(config_file: Path, header: Header) -> bool:
    """Whether a config.json is of the same model as the file: in ComfyUI's folder lie many."""
    config = read_json_object(config_file)
    text: Any = config.get("text_config", config)
    return isinstance(text, dict) and any(
        array.key.endswith(_NORM) and array.shape == (text.get("hidden_size"),) for array in header.arrays
    )
