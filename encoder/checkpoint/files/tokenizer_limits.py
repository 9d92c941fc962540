"""What a tokenizer.json may ask for. A small file can describe work, or a text, without end."""

import json
from collections.abc import Iterator
from math import prod
from typing import Any

import tokenizers

MAX_BYTES = 32 * 2**20  # Qwen3's tokenizer.json has 11 MB; the library takes up to 25 times a file's bytes
MAX_TEXT_BYTES = 4096  # of one text in it: the library takes 90 times the bytes of an added token
MAX_PARTS = 32  # normalizers, pre-tokenizers or processors, one after the other
MAX_GROWTH = 16  # of a text that is normalized
MAX_ADDED = 1000  # tokens that are added to every text

_INNER = ("normalizers", "pretokenizers", "processors")  # the parts of a Sequence


def parse_tokenizer(content: bytes) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json.

    Errors: ValueError when it is beyond a limit; whatever the library raises for what is none.
    """
    _expect_short_texts(content)
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor):
        if part is not None and (count := len(list(_parts(part)))) > MAX_PARTS:
            raise ValueError(f"it has {count:,} steps of one kind, expected at most {MAX_PARTS}")
    if tokenizer.normalizer is not None and (growth := prod(map(_growth, _parts(tokenizer.normalizer)))) > MAX_GROWTH:
        raise ValueError(f"its normalizer makes a text {growth:,} times as long, expected at most {MAX_GROWTH} times")
    if (added := tokenizer.num_special_tokens_to_add(False)) > MAX_ADDED:
        raise ValueError(f"it adds {added:,} tokens to every text, expected at most {MAX_ADDED:,}")
    return tokenizer


def _expect_short_texts(content: bytes) -> None:
    """Errors: ValueError for a string of JSON that is longer than any token."""
    plain = content.replace(rb"\\", b"..").replace(rb"\"", b"..")  # every quote left begins or ends a string
    longest = max(map(len, plain.split(b'"')))
    if longest > MAX_TEXT_BYTES:
        raise ValueError(f"it has a text of {longest:,} bytes, expected at most {MAX_TEXT_BYTES:,}")


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The steps of a component of the library."""
    return _flat(json.loads(component.__getstate__()))


def _flat(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = [part for name in _INNER for part in state.get(name, ())]
    if not inner:
        yield state
    for part in inner:
        yield from _flat(part)


def _growth(normalizer: dict[str, Any]) -> int:
    """How many times as long a normalizer makes a text at most, where a file decides that."""
    if normalizer.get("type") != "Replace":
        return 1
    replaced = len(normalizer["pattern"].get("String", ""))  # what a regular expression matches may be empty
    return max(1, -(-len(normalizer["content"]) // max(1, replaced)))
