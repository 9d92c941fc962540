"""Qwen's tokenizer around a vocabulary: how a text is normalized and split, and what is added to it. Knows no files.

Source: transformers, models/qwen2/tokenization_qwen2.py:Qwen2Tokenizer; llama.cpp, src/llama-vocab.cpp, PRE_TYPE_QWEN2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from encoder.messages import said

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def bpe_model(vocab: dict[str, int], merges: list[tuple[str, str]]) -> models.BPE:
    """A vocabulary and its merges, best first. Errors: ValueError for a merge of or to what is no token.

    The library checks that too late: it panics, which prints a trace.
    """
    for pair in merges:
        if missing := [token for token in (*pair, "".join(pair)) if token not in vocab]:
            raise ValueError(f"the merge {' '.join(pair)!r:.80} needs {missing[0]!r:.80}, which is no token")
    return models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns whatever the library raises into a ValueError of one line. Its panics are no Exception.

    Errors of the system stay what they are.
    """
    try:
        yield
    except (OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(said(error)) from error


def qwen2_tokenizer(model: models.BPE, *, add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """A tokenizer without added tokens.

    Args:
        model: the vocabulary and its merges.
        add_prefix_space: whether a text gets a blank in front where it has none.
    """
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def add_around(tokenizer: tokenizers.Tokenizer, before: Sequence[str], after: Sequence[str]) -> None:
    """Let the tokenizer put these tokens before and after every text. It must have them."""
    if before or after:
        ids = [(token, tokenizer.token_to_id(token)) for token in {*before, *after}]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
