"""Reads a Hugging Face folder, whole or sharded, and a diffusers pipeline folder; also as MLX and mflux save them."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.checkpoint.checkpoint import Checkpoint, describe
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.safetensors_files import Header, read_header
from encoder.checkpoint.files.tokenizer_files import first_with_tokenizer, open_named_tokenizer, open_tokenizer
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.assemble import Hints, assemble, by_key
from encoder.checkpoint.tensors.dims import config_from_shapes
from encoder.checkpoint.tensors.keys import parameter_name
from encoder.checkpoint.tensors.schemes import SCHEMES
from encoder.checkpoint.tensors.weights import Weights
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer
from encoder.qwen3.config import Qwen3Config

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_LISTED = 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Layout:
    """Which folders of a checkpoint hold what."""

    text_encoder: Path
    tokenizer: Path


def recognizes(request: Request) -> bool:
    """A folder."""
    return request.is_folder


def open_request(request: Request) -> Checkpoint:
    """Describe the checkpoint in a folder. Errors: as of `open_folder`."""
    return open_folder(request.path, request)


def open_folder(folder: Path, request: Request) -> Checkpoint:
    """Describe the checkpoint in `folder`; reads headers, no tensors.

    Args:
        folder: of a Qwen3 model, of a diffusers pipeline, or the `text_encoder` within one.
        request: that it answers.
    Errors: CheckpointError naming the file and what is wrong with it.
    """
    layout = find_layout(folder)
    headers = _open_headers(layout.text_encoder)
    raw_config = _read_config(layout.text_encoder, headers)
    config, weights = _open_weights(layout.text_encoder, headers, raw_config)
    tokenizer = (
        open_named_tokenizer(request.options.tokenizer, request.options.cache_dir)
        if request.options.tokenizer
        else open_tokenizer(layout.tokenizer)
    )
    warn_of_larger_vocabulary(tokenizer, config)
    return describe(
        request.name,
        config,
        weights,
        tokenizer,
        random_weights=bool(raw_config and raw_config.get("random_weights", False)),
    )


def find_layout(folder: Path) -> Layout:
    """Where text encoder and tokenizer are, in a pipeline folder and in a plain one."""
    inner = folder / "text_encoder"
    if (folder / "model_index.json").is_file() or (inner / CONFIG_FILE).is_file() or any(inner.glob("*.safetensors")):
        if not inner.is_dir():
            raise CheckpointError(
                f"{folder}: this diffusers pipeline has no text_encoder folder. "
                f"Name the Qwen3 checkpoint that it was published to go with."
            )
        text_encoder, candidates = inner, [folder / "tokenizer", folder / "processor", inner]
    else:
        text_encoder, candidates = folder, [folder, folder.parent / "tokenizer", folder.parent / "processor"]
    return Layout(text_encoder, first_with_tokenizer(candidates) or candidates[0])


def read_index(file: Path) -> dict[str, str]:
    """From the keys of the encoder's tensors to the names of the files that hold them.

    Errors: CheckpointError when the index is damaged, or leads out of its folder.
    """
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is no map of tensors to files, or empty.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or "\\" in name:
            raise CheckpointError(f"{file}: {key} is in {name!r}, expected the name of a file beside it.")
    return {key: name for key, name in weight_map.items() if parameter_name(key) is not None}


def warn_of_larger_vocabulary(tokenizer: Tokenizer, config: Qwen3Config) -> None:
    """Say in the log when the tokenizer has tokens that the model lacks."""
    if tokenizer.vocab_size > config.vocab_size:
        log.warning(
            "tokenizer.json has %d tokens, expected at most vocab_size %d of config.json: prompts with tokens beyond "
            "it will be refused. Are both from the same model?",
            *(tokenizer.vocab_size, config.vocab_size),
        )


def _open_headers(folder: Path) -> list[Header]:
    """The headers of the safetensors files of `folder`.

    Errors: CheckpointError when there are none, or the index names a file or a tensor that is not there.
    """
    if (folder / SINGLE_FILE).is_file():
        return [read_header(folder / SINGLE_FILE)]
    if (folder / INDEX_FILE).is_file():
        return _open_indexed(folder)
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())  # opening a pipe would hang
    if files:
        return [read_header(file) for file in files]
    models = sorted(file.name for file in folder.glob("*.gguf"))
    if models:
        raise CheckpointError(f"{folder}: holds GGUF files. Name one of them: {', '.join(models[:_LISTED])}.")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: has {', '.join(pickles)}, expected {SINGLE_FILE}. Pickle can run code and is not read; "
            f"convert it once with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"{folder / CONFIG_FILE}: does not exist. Is this the folder of a Qwen3 checkpoint?")
    raise CheckpointError(f"{folder}: has no *.safetensors file. Is the download complete?")


def _open_indexed(folder: Path) -> list[Header]:
    index = read_index(folder / INDEX_FILE)
    files = [folder / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing, but named in {INDEX_FILE}. Fetch them again.")
    headers = [read_header(file) for file in files]
    present = {(array.key, array.file.name) for header in headers for array in header.arrays}
    absent = sorted(index.items() - present)
    if absent:
        listed = ", ".join(f"{key} in {name}" for key, name in absent[:_LISTED])
        more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        raise CheckpointError(
            f"{folder / INDEX_FILE}: names {listed}{more}, which is not there. Fetch the files again."
        )
    return headers


def _read_config(folder: Path, headers: list[Header]) -> dict[str, Any] | None:
    """The parsed config.json; None where mflux saved the folder, which writes none."""
    if not (folder / CONFIG_FILE).is_file() and any("mflux_version" in header.metadata for header in headers):
        return None
    return read_json_object(folder / CONFIG_FILE)


def _open_weights(
    folder: Path, headers: list[Header], raw_config: dict[str, Any] | None
) -> tuple[Qwen3Config, Weights]:
    """The dims and the tensors, the one with the help of the other."""
    arrays = by_key(array for header in headers for array in header.arrays)
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    dims = None if raw_config is None else Qwen3Config.from_dict(raw_config)
    tensors = assemble(arrays, SCHEMES, Hints(raw_config or {}, metadata, dims))
    # What mflux saves is Qwen3 for Z-Image and FLUX.2; theta stands nowhere in the files.
    return dims or config_from_shapes(tensors, str(folder), rope_theta=1e6), Weights(tensors)
