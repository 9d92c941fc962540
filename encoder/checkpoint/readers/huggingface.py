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
    WEIGHTS_FILE,
    Layout,
    find_layout,
    listed,
    model_files,
    read_index,
)
from encoder.checkpoint.files.safetensors_header import Header, read_header
from encoder.checkpoint.readers.gguf import open_gguf
from encoder.checkpoint.readers.safetensors import Files, open_files
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"\d+|.*-\d{5}-of-\d{5}|weights\.\d+")  # stems; mflux calls its files 0, 1, 2


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
    layout = find_layout(folder, request.options.component)
    model = _single_gguf(layout.text_encoder)
    if model is not None:
        return open_gguf(model, request)
    headers = _read_headers(layout)
    config_file = layout.text_encoder / CONFIG_FILE
    if not config_file.is_file():
        _expect_one_model(layout.text_encoder, headers)
    files = Files(
        where=layout.text_encoder,
        headers=headers,
        config_file=config_file if config_file.is_file() else None,
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
    models = [file for file in model_files(folder, ".gguf") if not file.name.startswith("mmproj")]
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
    if (folder / WEIGHTS_FILE).is_file():
        return [read_header(folder / WEIGHTS_FILE)]
    if (folder / INDEX_FILE).is_file():
        return _read_indexed_headers(folder, layout.component)
    files = model_files(folder, ".safetensors")
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


def _expect_one_model(folder: Path, headers: list[Header]) -> None:
    """Errors: CheckpointError for several files that are not the parts of one model, as in ComfyUI's folders."""
    names = sorted({array.file.name for header in headers for array in header.arrays})
    if len(names) > 1 and not all(_SHARD.fullmatch(Path(name).stem) for name in names):
        raise CheckpointError(
            f"{folder}: holds {len(names)} safetensors files and no {CONFIG_FILE}. Name the one to serve: "
            f"{listed(names)}."
        )


def _explain_missing_weights(folder: Path) -> str:
    """What to do about a folder without a safetensors file, from what it holds instead."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{folder}: has {listed(pickles)}, expected {WEIGHTS_FILE}. Pickle can run code and is not read; "
            f"convert it once with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    if not (folder / CONFIG_FILE).is_file():
        return f"{folder}: has neither {CONFIG_FILE} nor weights. Is this the folder of a Qwen3 checkpoint?"
    return f"{folder}: has no *.safetensors file. Is the download complete?"
