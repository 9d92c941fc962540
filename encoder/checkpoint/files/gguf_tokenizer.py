"""Builds the tokenizer that a GGUF file's metadata describe. Reads Qwen's byte-level BPE, and no other kind.

Source: transformers, convert_slow_tokenizer.py:Qwen2Converter; llama.cpp, src/llama-vocab.cpp, PRE_TYPE_QWEN2.
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type: tokens that are matched whole in any text


def tokenizer_from_metadata(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that the metadata describe. Errors: CheckpointError for none, or another kind."""
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges", [])
    types = metadata.get("tokenizer.ggml.token_type", ())
    if kind != ("gpt2", "qwen2") or not _are_texts(tokens) or not (_are_texts(merges) or merges == []):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model and pre are {kind!r}, expected 'gpt2' and 'qwen2' with tokens and merges. "
            f"Give the tokenizer with --tokenizer: a tokenizer.json, a folder, or a hub id."
        )
    assert isinstance(tokens, list)
    pad = metadata.get("tokenizer.ggml.padding_token_id")
    pad_token = tokens[pad] if isinstance(pad, int) and 0 <= pad < len(tokens) else None
    try:
        return Tokenizer(_build(tokens, merges, types), pad_token, f"the metadata of {where}")
    except CheckpointError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{where}: its tokenizer cannot be built: {error}") from error


def _build(tokens: list[str], merges: list[str], types: Any) -> tokenizers.Tokenizer:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL) for token, kind in added])
    return tokenizer


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)
