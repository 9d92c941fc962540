"""Finds and opens the tokenizer that belongs to a checkpoint."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

QWEN3_TOKENS = 151_643  # in the vocabulary, before the added ones
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer.json in `folder`."""
    return (folder / TOKENIZER_FILE).is_file()


def first_with_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The first of `folders` that has a tokenizer.json."""
    return next(filter(has_tokenizer, folders), None)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`.

    Errors: CheckpointError when tokenizer.json is missing or damaged, or no padding token is known.
    """
    if has_tokenizer(folder):
        return Tokenizer.from_file(folder / TOKENIZER_FILE, pad_token(folder / TOKENIZER_CONFIG_FILE))
    if (folder / "vocab.json").is_file():
        raise CheckpointError(
            f"{folder}: has vocab.json, but no {TOKENIZER_FILE}. Convert it once with transformers: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    raise CheckpointError(f"{folder}: has no {TOKENIZER_FILE}. Copy it there from the model's repository.")


def find_tokenizer(request: Request, folders: Sequence[Path], vocab_size: int) -> Tokenizer:
    """The tokenizer for weights that come without one: what the user named, else what lies in one of `folders`, else
    Qwen3's own from the hub or its cache; all models of the family share it.

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
        from encoder.checkpoint.readers import hub  # the hub's reader itself opens tokenizers

        folder = hub.fetch_qwen3_tokenizer(request.options.cache_dir)
    log.info("%s: has no tokenizer; taken from %s", request.name, folder)
    return open_tokenizer(folder)


def open_named_tokenizer(name: str, cache_dir: Path | None) -> Tokenizer:
    """The tokenizer that the user named: a tokenizer.json, a folder, or a hub id.

    Errors: CheckpointError when it is none of them, or cannot be read.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return Tokenizer.from_file(path, pad_token(path.with_name(TOKENIZER_CONFIG_FILE)))
    if path.is_dir():
        return open_tokenizer(first_with_tokenizer([path, path / "tokenizer", path / "processor"]) or path)

    from encoder.checkpoint.readers import hub  # the hub's reader itself opens tokenizers

    folder = hub.fetch_tokenizer(name, cache_dir)
    if folder is None:
        raise CheckpointError(f"tokenizer {name!r}: expected a tokenizer.json, a folder with one, or a hub id.")
    return open_tokenizer(folder)


def pad_token(config_file: Path) -> str | None:
    """`pad_token` of tokenizer_config.json: a string, or an object with the string as `content`."""
    if not config_file.is_file():
        return None
    token = read_json_object(config_file).get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
