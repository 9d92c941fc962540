"""Reads the folder of a model or of a diffusers pipeline, as Hugging Face's libraries, MLX and mflux save them.

A folder without config.json whose model is a single file is read as that file.
"""

import re
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.gguf_parts import part_names
from encoder.checkpoint.files.layout import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    PIPELINE_FILE,
    SHARD_NAME,
    WEIGHTS_FILE,
    Layout,
    find_layout,
    is_there,
    model_files,
    read_index,
)
from encoder.checkpoint.files.safetensors_header import Header, read_header
from encoder.checkpoint.readers.gguf import open_gguf
from encoder.checkpoint.readers.safetensors import Files, open_files
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError
from encoder.messages import listed

_UNFINISHED_SUFFIXES = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp", ".!qb")
_STAND_FOR_FOLDER = (CONFIG_FILE, INDEX_FILE, PIPELINE_FILE)  # names of files whose folder a user means
_SHARD = re.compile(r"\d+|.*-\d{5}-of-\d{5}|weights\.\d+")  # stems; mflux calls its files 0, 1, 2

# What llama.cpp's tools put beside a GGUF model: the projector of its vision tower, and statistics of activations.
_BESIDE_GGUF = re.compile(r"mmproj|imatrix", re.IGNORECASE)


def recognizes(request: Request) -> bool:
    """A folder, or the file in it that describes the model."""
    return request.is_folder or (request.path.name in _STAND_FOR_FOLDER and request.path.is_file())


def open_request(request: Request) -> Checkpoint:
    """Describe the checkpoint in a folder. Errors: as of `open_folder`."""
    return open_folder(request.path if request.is_folder else request.path.parent, request)


def open_folder(folder: Path, request: Request) -> Checkpoint:
    """Describe the checkpoint in `folder`. Reads headers, no tensors.

    Args:
        folder: of a Qwen3 model, of a diffusers pipeline, or the `text_encoder` within one.
        request: the request that the checkpoint answers.
    Errors: CheckpointError naming the file and what is wrong with it.
    """
    layout = find_layout(folder, request.options.component)
    model = _single_gguf(layout.text_encoder)
    if model is not None:
        return open_gguf(model, request)
    headers = _read_headers(layout)
    config_file = layout.text_encoder / CONFIG_FILE
    has_config = is_there(config_file)
    if not has_config:
        _expect_one_model(layout.text_encoder, headers)
    files = Files(
        where=layout.text_encoder if has_config else _only_file(layout.text_encoder, headers),
        headers=headers,
        config_file=config_file if has_config else None,
        tokenizers=layout.tokenizers,
        component=layout.component,
        format="safetensors folder" + (" of mflux" if any("mflux_version" in h.metadata for h in headers) else ""),
    )
    return open_files(files, request)


def _single_gguf(folder: Path) -> Path | None:
    """The GGUF model of a folder without safetensors files, as LM Studio keeps one: its first part if it has several.

    Errors: CheckpointError where there are several models to choose from.
    """
    if model_files(folder, ".safetensors"):
        return None
    models = [file for file in model_files(folder, ".gguf") if not _BESIDE_GGUF.search(file.name)]
    firsts = [file for file in models if part_names(file.name)[0] == file.name]
    if len(firsts) > 1:
        raise CheckpointError(
            f"{folder}: holds several GGUF files. Name one of them: {listed(file.name for file in firsts)}."
        )
    return next(iter(firsts or models), None)


def _read_headers(layout: Layout) -> list[Header]:
    """The headers of the safetensors files of a folder.

    Errors: CheckpointError when there are none, or the index names a file or a tensor that is not there.
    """
    folder = layout.text_encoder
    weights = folder / WEIGHTS_FILE
    if (weights.is_file() or weights.is_symlink()) and is_there(weights):
        return [read_header(weights)]
    if is_there(folder / INDEX_FILE):
        return _read_indexed_headers(folder, layout.component)
    files = model_files(folder, ".safetensors")
    _expect_all_shards(folder, [file.name for file in files])
    if files:
        return [read_header(file) for file in files]
    raise CheckpointError(_explain_missing_weights(folder))


def _read_indexed_headers(folder: Path, component: str | None) -> list[Header]:
    index = read_index(folder / INDEX_FILE, component)
    files = [folder / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {listed(missing)} missing, but named in {INDEX_FILE}. Fetch them again.")
    headers = [read_header(file) for file in files]
    present = {(array.key, array.file.name) for header in headers for array in header.arrays}
    absent = sorted(index.items() - present)
    if absent:
        raise CheckpointError(
            f"{folder / INDEX_FILE}: names {listed(f'{key} in {name}' for key, name in absent)}, which is not there. "
            f"Fetch the files again."
        )
    return headers


def _only_file(folder: Path, headers: list[Header]) -> Path:
    """The file that is the folder's model, where its name may say which; else the folder."""
    files = {array.file for header in headers for array in header.arrays}
    own_name = len(files) == 1 and not any(_SHARD.fullmatch(file.stem) or file.name == WEIGHTS_FILE for file in files)
    return files.pop() if own_name else folder


def _expect_one_model(folder: Path, headers: list[Header]) -> None:
    """Errors: CheckpointError for several files that are not the parts of one model, as in ComfyUI's folders."""
    names = sorted({array.file.name for header in headers for array in header.arrays})
    if len(names) > 1 and not all(_SHARD.fullmatch(Path(name).stem) for name in names):
        raise CheckpointError(
            f"{folder}: holds {len(names)} safetensors files and no {CONFIG_FILE}. Name the one to serve: "
            f"{listed(names)}."
        )


def _expect_all_shards(folder: Path, names: list[str]) -> None:
    """Errors: CheckpointError when the files' own numbers say that one is missing."""
    series = {match.groups() for match in map(SHARD_NAME.fullmatch, names) if match}
    expected = {
        f"{before}{number:05}-of-{count}{after}"
        for before, count, after in series
        for number in range(1, int(count) + 1)
    }
    missing = sorted(expected - set(names))
    if missing:
        raise CheckpointError(f"{folder}: {listed(missing)} missing, of the model's files. Fetch them too.")


def _explain_missing_weights(folder: Path) -> str:
    """What to do about a folder without a safetensors file, from what it holds instead."""
    unfinished = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _UNFINISHED_SUFFIXES)
    if unfinished:
        return f"{folder}: {listed(unfinished)} is what a download has not finished. Start it again to resume it."
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder}: has {listed(pickles)}, expected {WEIGHTS_FILE}. Pickle can run code and is not read; "
            f"convert it once with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    if not (folder / CONFIG_FILE).is_file():
        return f"{folder}: has neither {CONFIG_FILE} nor weights. Is this the folder of a Qwen3 checkpoint?"
    return f"{folder}: has no *.safetensors file. Is the download complete?"
