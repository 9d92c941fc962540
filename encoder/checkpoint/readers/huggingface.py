"""Reads the folder of a model or of a diffusers pipeline, as Hugging Face's libraries, MLX and mflux save them."""

from pathlib import Path
from typing import Any

from encoder.checkpoint.checkpoint import Checkpoint, describe
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, find_layout, read_index
from encoder.checkpoint.files.safetensors_header import Header, read_header
from encoder.checkpoint.files.tokenizer_files import open_named_tokenizer, open_tokenizer, warn_of_larger_vocabulary
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.assemble import Hints, assemble, by_key
from encoder.checkpoint.tensors.dims import config_from_shapes
from encoder.checkpoint.tensors.families import QWEN3_THETA
from encoder.checkpoint.tensors.schemes import SCHEMES
from encoder.checkpoint.tensors.weights import Weights
from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

_MAX_LISTED = 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def recognizes(request: Request) -> bool:
    """A folder."""
    return request.is_folder


def open_request(request: Request) -> Checkpoint:
    """Describe the checkpoint in a folder. Errors: as of `open_folder`."""
    return open_folder(request.path, request)


def open_folder(folder: Path, request: Request) -> Checkpoint:
    """Describe the checkpoint in `folder`. Reads headers, no tensors.

    Args:
        folder: of a Qwen3 model, of a diffusers pipeline, or the `text_encoder` within one.
        request: the request that the checkpoint answers.
    Errors: CheckpointError naming the file and what is wrong with it.
    """
    layout = find_layout(folder)
    headers = _read_headers(layout.text_encoder)
    raw_config = _read_config(layout.text_encoder, headers)
    config, weights = _describe_weights(layout.text_encoder, headers, raw_config)
    if request.options.tokenizer:
        tokenizer = open_named_tokenizer(request.options.tokenizer, request.options.cache_dir)
    else:
        tokenizer = open_tokenizer(layout.tokenizer)
    warn_of_larger_vocabulary(tokenizer, config.vocab_size)
    random_weights = bool(raw_config and raw_config.get("random_weights", False))
    return describe(request.name, config, weights, tokenizer, random_weights=random_weights)


def _read_headers(folder: Path) -> list[Header]:
    """The headers of the safetensors files of `folder`.

    Errors: CheckpointError when there are none, or the index names a file or a tensor that is not there.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [read_header(folder / WEIGHTS_FILE)]
    if (folder / INDEX_FILE).is_file():
        return _read_indexed_headers(folder)
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())  # opening a pipe would hang
    if files:
        return [read_header(file) for file in files]
    raise CheckpointError(_explain_missing_weights(folder))


def _read_indexed_headers(folder: Path) -> list[Header]:
    index = read_index(folder / INDEX_FILE)
    files = [folder / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing, but named in {INDEX_FILE}. Fetch them again.")
    headers = [read_header(file) for file in files]
    present = {(array.key, array.file.name) for header in headers for array in header.arrays}
    absent = sorted(index.items() - present)
    if absent:
        listed = ", ".join(f"{key} in {name}" for key, name in absent[:_MAX_LISTED])
        more = f" and {len(absent) - _MAX_LISTED} more" if len(absent) > _MAX_LISTED else ""
        raise CheckpointError(
            f"{folder / INDEX_FILE}: names {listed}{more}, which is not there. Fetch the files again."
        )
    return headers


def _explain_missing_weights(folder: Path) -> str:
    """What to do about a folder without a safetensors file, from what it holds instead."""
    models = sorted(file.name for file in folder.glob("*.gguf"))
    if models:
        return f"{folder}: holds GGUF files. Name one of them: {', '.join(models[:_MAX_LISTED])}."
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder}: has {', '.join(pickles)}, expected {WEIGHTS_FILE}. Pickle can run code and is not read; "
            f"convert it once with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    if not (folder / CONFIG_FILE).is_file():
        return f"{folder / CONFIG_FILE}: does not exist. Is this the folder of a Qwen3 checkpoint?"
    return f"{folder}: has no *.safetensors file. Is the download complete?"


def _read_config(folder: Path, headers: list[Header]) -> dict[str, Any] | None:
    """The parsed config.json; None where mflux saved the folder, which writes none."""
    if not (folder / CONFIG_FILE).is_file() and any("mflux_version" in header.metadata for header in headers):
        return None
    return read_json_object(folder / CONFIG_FILE)


def _describe_weights(
    folder: Path, headers: list[Header], raw_config: dict[str, Any] | None
) -> tuple[Qwen3Config, Weights]:
    """The dims and the tensors. Where there is no config.json, the dims follow from the tensors' shapes."""
    arrays = by_key(array for header in headers for array in header.arrays)
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    dims = None if raw_config is None else Qwen3Config.from_dict(raw_config, str(folder / CONFIG_FILE))
    tensors = assemble(arrays, SCHEMES, Hints(raw_config or {}, metadata, dims))
    # mflux saves the Qwen3 of Z-Image and FLUX.2. Its files do not say rope_theta.
    return dims or config_from_shapes(tensors, str(folder), QWEN3_THETA), Weights(tensors)
