"""Builds the tokenizer that a GGUF file's metadata describe. Reads Qwen's byte-level BPE, and no other kind.

Source: llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load and PRE_TYPE_QWEN2.
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken

from encoder.checkpoint.files.qwen2_tokenizer import add_around, bpe_model, in_one_line, qwen2_tokenizer
from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.pipeline.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type: tokens that are matched whole in any text


def tokenizer_from_metadata(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that the metadata describe.

    Errors: CheckpointError for none, for another kind, and for an added token that does not exist.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges", [])
    types = metadata.get("tokenizer.ggml.token_type", ())
    if kind != ("gpt2", "qwen2") or not _are_texts(tokens) or not (_are_texts(merges) or merges == []):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model and pre are {shown(kind)}, expected 'gpt2' and 'qwen2' with tokens and "
            f"merges. Give the tokenizer with --tokenizer: a tokenizer.json, a folder, or a hub id."
        )
    assert isinstance(tokens, list)
    before, after = (_added(metadata, tokens, end, where) for end in ("bos", "eos"))
    try:
        with in_one_line():
            tokenizer = _build(tokens, merges, types)
            add_around(tokenizer, before, after)
    except ValueError as error:
        raise CheckpointError(
            f"{where}: its tokenizer cannot be built: {error}. Give one with --tokenizer, or fetch the file again."
        ) from error
    return Tokenizer(tokenizer, _named(metadata, tokens, "padding"), f"the metadata of {where}")


def _build(tokens: list[str], merges: list[str], types: Any) -> tokenizers.Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = qwen2_tokenizer(bpe_model(vocab, pairs))
    added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added])
    return tokenizer


def _added(metadata: dict[str, Any], tokens: list[str], end: str, where: str) -> list[str]:
    """The token that llama.cpp adds at this end of a text, "bos" or "eos": only where a flag says so."""
    if metadata.get(f"tokenizer.ggml.add_{end}_token") is not True:
        return []
    token = _named(metadata, tokens, end)
    if token is None:
        raise CheckpointError(
            f"{where}: tokenizer.ggml.add_{end}_token is true, but {end}_token_id names none of the {len(tokens):,} "
            f"tokens. Give the tokenizer with --tokenizer."
        )
    return [token]


def _named(metadata: dict[str, Any], tokens: list[str], role: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
    return tokens[token_id] if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)
