"""Finds and opens the tokenizer that belongs to a checkpoint."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from encoder.checkpoint.files.hub_files import fetch_qwen3_tokenizer, fetch_tokenizer
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FOLDERS,
    first_with_tokenizer,
    has_tokenizer,
)
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

QWEN3_TOKENS = 151_643  # in Qwen3's vocabulary, without the added tokens


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`.

    Errors: CheckpointError when tokenizer.json is missing or damaged, or no padding token is known.
    """
    if has_tokenizer(folder):
        return Tokenizer.from_file(folder / TOKENIZER_FILE, read_pad_token(folder / TOKENIZER_CONFIG_FILE))
    if (folder / "vocab.json").is_file():
        raise CheckpointError(
            f"{folder}: has vocab.json, but no {TOKENIZER_FILE}. Convert it once with transformers: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    raise CheckpointError(f"{folder}: has no {TOKENIZER_FILE}. Copy it there from the model's repository.")


def open_named_tokenizer(name: str, cache_dir: Path | None) -> Tokenizer:
    """The tokenizer that the user named: a tokenizer.json, a folder, or a hub id.

    Errors: CheckpointError when it is none of them, or cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return Tokenizer.from_file(path, read_pad_token(path.with_name(TOKENIZER_CONFIG_FILE)))
    if path.is_dir():
        return open_tokenizer(first_with_tokenizer([path, *(path / inner for inner in TOKENIZER_FOLDERS)]) or path)
    folder = fetch_tokenizer(name, cache_dir)
    if folder is None:
        raise CheckpointError(f"tokenizer {name!r}: expected a tokenizer.json, a folder with one, or a hub id.")
    return open_tokenizer(folder)


def find_tokenizer(request: Request, folders: Sequence[Path], vocab_size: int) -> Tokenizer:
    """The tokenizer for weights that come without one.

    It is the one that the user named, else the first in `folders`, else Qwen3's own from the hub or its cache: all
    models of the family share it.

    Errors: CheckpointError when there is none, or the vocabulary is not Qwen3's.
    """
    if request.options.tokenizer is not None:
        return open_named_tokenizer(request.options.tokenizer, request.options.cache_dir)
    folder = first_with_tokenizer(folders)
    if folder is None and vocab_size < QWEN3_TOKENS:
        raise CheckpointError(
            f"{request.name}: has no tokenizer, and none lies beside it. Its vocabulary of {vocab_size:,} is not "
            f"Qwen3's, so give its own with --tokenizer: a {TOKENIZER_FILE}, a folder, or a hub id."
        )
    if folder is None:
        folder = fetch_qwen3_tokenizer(request.options.cache_dir)
    log.info("%s: has no tokenizer; taken from %s", request.name, folder)
    return open_tokenizer(folder)


def read_pad_token(config_file: Path) -> str | None:
    """`pad_token` of a tokenizer_config.json: a string, or an object with the string as `content`.

    Returns: None when the file does not exist, or names no padding token.
    """
    if not config_file.is_file():
        return None
    token = read_json_object(config_file).get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def warn_of_larger_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Say in the log when the tokenizer has tokens that the model lacks."""
    if tokenizer.vocab_size > vocab_size:
        log.warning(
            "the tokenizer has %d tokens, expected at most the %d of the model's vocabulary: prompts with tokens "
            "beyond it will be refused. Are both from the same model?",
            *(tokenizer.vocab_size, vocab_size),
        )
