"""Finds the tokenizer that belongs to a checkpoint. `tokenizer_build` makes it from its files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from encoder.checkpoint.files.hub_files import fetch_qwen3_tokenizer, fetch_tokenizer
from encoder.checkpoint.files.layout import (
    CONFIG_FILE,
    MERGES_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDERS,
    VOCAB_FILE,
    first_with_tokenizer,
    has_tokenizer,
    is_there,
)
from encoder.checkpoint.files.tokenizer_build import build_tokenizer
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer

QWEN3_TOKENS = 151_643  # in Qwen3's vocabulary, without the added tokens


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`.

    Errors: CheckpointError when its files are missing or damaged.
    """
    if has_tokenizer(folder):
        return build_tokenizer(_files_in(folder))
    if half := _half_a_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: has {half}, expected {TOKENIZER_FILE}, or both {VOCAB_FILE} and {MERGES_FILE}. "
            f"Copy the other there from the model's repository."
        )
    raise CheckpointError(f"{folder}: has no {TOKENIZER_FILE}. Copy it there from the model's repository.")


def open_named_tokenizer(name: str, cache_dir: Path | None) -> Tokenizer:
    """The tokenizer that the user named: a tokenizer.json of any name, a folder or any of its files, or a hub id.

    Errors: CheckpointError when it is none of them, or cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file() and path.name in TOKENIZER_FILES:
        path = path.parent
    if path.is_file():
        return build_tokenizer({**_files_in(path.parent), TOKENIZER_FILE: path})
    if path.is_dir():
        return open_tokenizer(first_with_tokenizer([path, *(path / inner for inner in TOKENIZER_FOLDERS)]) or path)
    folder = fetch_tokenizer(name, cache_dir)
    if folder is None:
        raise CheckpointError(f"tokenizer {name!r}: expected a tokenizer.json, a folder with one, or a hub id.")
    return open_tokenizer(folder)


def find_tokenizer(request: Request, folders: Sequence[Path], vocab_size: int) -> Tokenizer:
    """The tokenizer for weights that hold none.

    It is the one that the user named, else the first in `folders`, else Qwen3's own from the hub or its cache: all
    models of the family share it.

    Errors: CheckpointError when there is none, or the vocabulary is not Qwen3's.
    """
    if request.options.tokenizer is not None:
        return open_named_tokenizer(request.options.tokenizer, request.options.cache_dir)
    folder = first_with_tokenizer(folders) or next(filter(_half_a_tokenizer, folders), None)
    if folder is None and vocab_size < QWEN3_TOKENS:
        raise CheckpointError(
            f"{request.name}: has no tokenizer, and none lies beside it. Its vocabulary of {vocab_size:,} is not "
            f"Qwen3's, so give its own with --tokenizer: a {TOKENIZER_FILE}, a folder, or a hub id."
        )
    if folder is None:
        folder = fetch_qwen3_tokenizer(request.options.cache_dir)
    return open_tokenizer(folder)


def _half_a_tokenizer(folder: Path) -> str | None:
    """The one of a slow tokenizer's two files that is there, None where both are or none is."""
    found = [name for name in (VOCAB_FILE, MERGES_FILE) if (folder / name).is_file()]
    return found[0] if len(found) == 1 else None


def _files_in(folder: Path) -> Mapping[str, Path]:
    """The files of a folder that decide what its tokenizer is, by name."""
    files = {name: folder / name for name in (*TOKENIZER_FILES, CONFIG_FILE)}
    return {name: file for name, file in files.items() if is_there(file)}
