"""Builds the tokenizer that `AutoTokenizer` of transformers 5 builds from the same files.

Where the class is Qwen2Tokenizer, transformers takes vocabulary, merges and post-processor from tokenizer.json, and all
else from the class and from tokenizer_config.json. For other classes tokenizer.json is taken as it is.
Source: transformers 5.24, models/auto/tokenization_auto.py, tokenization_utils_tokenizers.py.
"""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from encoder.checkpoint.files.declared_tokens import Token, declared_tokens
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    MERGES_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCAB_FILE,
)
from encoder.checkpoint.files.lookalikes import explain_lookalike
from encoder.checkpoint.files.qwen2_tokenizer import add_around, bpe_model, in_one_line, qwen2_tokenizer
from encoder.checkpoint.files.tokenizer_limits import MAX_BYTES, parse_tokenizer
from encoder.checkpoint.files.unreadable import unreadable
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer
from encoder.regular_file import read_file

_QWEN2_CLASS = "Qwen2Tokenizer"
# Models whose class transformers knows where the settings name none.
_QWEN2_MODELS = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe")


def build_tokenizer(files: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer in these files.

    Args:
        files: by name: config.json and those in `layout.TOKENIZER_FILES`. What is missing does not exist. One is
            tokenizer.json, or two are vocab.json and merges.txt.
    Errors: CheckpointError naming the file that is missing or damaged, and what it is.
    """
    settings = _read(files, TOKENIZER_CONFIG_FILE)
    if TOKENIZER_FILE not in files:
        return _from_vocabulary(files, settings)
    stored = read_tokenizer_json(files[TOKENIZER_FILE])
    if _is_qwen2(files, settings) and isinstance(stored.model, models.BPE):
        tokenizer = _as_qwen2(stored, settings)
        return _finish(tokenizer, files, settings, stored.get_added_tokens_decoder(), qwen2=True)
    padding = stored.padding or {}
    settings = {"pad_token": padding.get("pad_token")} | settings  # transformers adds it to the vocabulary
    return _finish(stored, files, settings, stored.get_added_tokens_decoder(), qwen2=False)


def read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, as it is. Errors: CheckpointError saying what the file is."""
    with _as_checkpoint_errors(file):
        # Not from_file, which knows neither the byte order mark of Windows' editors nor names that are no UTF-8.
        return parse_tokenizer(_read_bytes(file).removeprefix(BOM_UTF8))


def parse_tokenizer_json(content: bytes, where: str) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json that has no files beside it. Errors: CheckpointError."""
    try:
        with in_one_line():
            tokenizer = parse_tokenizer(content)
    except ValueError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error
    return Tokenizer(tokenizer, source=where)


def _is_qwen2(files: Mapping[str, Path], settings: Mapping[str, Any]) -> bool:
    """Whether transformers makes a Qwen2Tokenizer of a tokenizer.json."""
    name = settings.get("tokenizer_class")
    if name is None:
        return _read(files, CONFIG_FILE).get("model_type") in _QWEN2_MODELS
    return _class_name(name) == _QWEN2_CLASS


def _class_name(name: object) -> str:
    return str(name).removesuffix("Fast")


def _as_qwen2(stored: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer with the vocabulary, the merges and the post-processor of another, and no added tokens."""
    model = stored.model
    model.dropout = model.unk_token = None
    model.fuse_unk = model.byte_fallback = model.ignore_merges = False
    tokenizer = qwen2_tokenizer(model, add_prefix_space=settings.get("add_prefix_space") is True)
    if stored.post_processor is not None:
        tokenizer.post_processor = stored.post_processor
    return tokenizer


def _from_vocabulary(files: Mapping[str, Path], settings: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of vocab.json and merges.txt, which say nothing of how a text is split: Qwen2's way is."""
    vocab, merges = files[VOCAB_FILE], files.get(MERGES_FILE)
    if merges is None:
        raise CheckpointError(f"{vocab}: has no {MERGES_FILE} beside it. Fetch that too, or {TOKENIZER_FILE}.")
    if _class_name(settings.get("tokenizer_class") or _QWEN2_CLASS) != _QWEN2_CLASS:
        raise CheckpointError(
            f"{files[TOKENIZER_CONFIG_FILE]}: tokenizer_class is {settings['tokenizer_class']!r:.80}, expected "
            f"{_QWEN2_CLASS}, where there is no {TOKENIZER_FILE}. Fetch that file too."
        )
    with _as_checkpoint_errors(vocab, merges):
        model = bpe_model(json.loads(_read_bytes(vocab)), _read_merges(merges))
    tokenizer = qwen2_tokenizer(model, add_prefix_space=settings.get("add_prefix_space") is True)
    return _finish(tokenizer, files, settings, {}, qwen2=True)


def _read_merges(file: Path) -> list[tuple[str, str]]:
    """The two parts of each merge, a line each, below a line with the version."""
    lines = _read_bytes(file).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"the merge {' '.join(wrong)!r:.80} has {len(wrong)} parts, expected two")
    return [(first, second) for first, second in merges]


def _finish(
    tokenizer: tokenizers.Tokenizer,
    files: Mapping[str, Path],
    settings: Mapping[str, Any],
    stored: Mapping[int, AddedToken],
    *,
    qwen2: bool,
) -> Tokenizer:
    """Add the tokens that the files declare."""
    where = files.get(TOKENIZER_CONFIG_FILE) or next(iter(files.values()))
    older = (_read(files, SPECIAL_TOKENS_MAP_FILE), _read(files, ADDED_TOKENS_FILE))
    try:
        with in_one_line():
            declared = declared_tokens(settings, *older, stored, qwen2=qwen2)
            declared.add_to(tokenizer)
            if qwen2:
                declared.restate(tokenizer)
            if TOKENIZER_FILE not in files:
                _add_around(tokenizer, settings, declared.named)
    except ValueError as error:
        raise CheckpointError(f"{where}: declares tokens that cannot be added: {error}.") from error
    tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
    pad_token = declared.named.get("pad_token")
    source = str(files.get(TOKENIZER_FILE) or files[VOCAB_FILE])
    return Tokenizer(tokenizer, None if pad_token is None else str(pad_token), source)


def _add_around(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], named: Mapping[str, Token]) -> None:
    """Add the tokens around a text as the settings say; a tokenizer.json says so itself."""
    bos, eos = (
        [str(named[token])] if settings.get(f"add_{token}") is True and token in named else []
        for token in ("bos_token", "eos_token")
    )
    add_around(tokenizer, bos, eos)


@contextmanager
def _as_checkpoint_errors(*files: Path) -> Iterator[None]:
    """Turns each error of the library into a CheckpointError that says what the files are."""
    try:
        with in_one_line():
            yield
    except OSError as error:
        raise unreadable(Path(error.filename or files[0]), error) from error
    except ValueError as error:
        for file in files:
            if found := explain_lookalike(file, expects_text=True):
                raise CheckpointError(f"{file}: {found}") from error
        raise CheckpointError(
            f"{' and '.join(map(str, files))}: cannot be read as a tokenizer, and may be cut off: {error}. "
            f"Fetch it again."
        ) from error


def _read_bytes(file: Path) -> bytes:
    return read_file(file, MAX_BYTES)


def _read(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json_object(files[name]) if name in files else {}
