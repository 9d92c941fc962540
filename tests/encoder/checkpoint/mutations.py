"""Changes files at random, as transfers, disks, converters and strangers do. A seed repeats them."""

import json
import random
import re
import struct
from pathlib import Path
from typing import Any

_TEXTS = (b"0", b"-1", b"null", b"[]", b"{}", b"1e999", b"9" * 20, b'"x"', b"true", b"\0", b"\xff", b"../../x", b"NaN")
_NESTED = "[...]"  # stands for arrays in arrays, deeper than a parser follows
_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 0.5, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf")),
    *("", "x", "1", "../../x", "a\nb", "\ud800", "\u0000", "x" * 100_000),
    *([], {}, [None], [1, "x"], {"x": None}, {"": {}}, [[]] * 1000, _NESTED),
)
_HEADER_BYTES = 12_000  # of other files than safetensors, in which changes are made


def mutate(file: Path, rng: random.Random) -> bytes:
    """The content of `file` with one thing changed in its bytes, or in the values of its JSON."""
    content = file.read_bytes()
    if rng.randrange(2):
        document = _json_of(file, content)
        if document is not None:
            return _with_json(file, content, _spliced(document, rng))
    return change_bytes(content, _header_length(file, content), rng)


def change_bytes(content: bytes, length: int, rng: random.Random) -> bytes:
    """One change within the first `length` bytes."""
    position = rng.randrange(length)
    match rng.randrange(6):
        case 0:
            return content[:position] + bytes([rng.randrange(256)]) + content[position + 1 :]
        case 1:
            return content[:position] + rng.choice([b"\xff", b"\0", b"\x7f"]) * 8 + content[position + 8 :]
        case 2:
            return content[:position] + content[position + rng.randrange(1, 50) :]
        case 3:
            return content[:position]
        case 4:
            other = rng.randrange(length)
            return content[:position] + content[other : other + rng.randrange(1, 200)] + content[position:]
        case _:
            value = rng.choice(list(re.finditer(rb'\d+|true|false|null|"[^"]{0,30}"', content[:length])))
            return content[: value.start()] + rng.choice(_TEXTS) + content[value.end() :]


def _header_length(file: Path, content: bytes) -> int:
    if file.suffix == ".safetensors":
        return min(len(content), 8 + int.from_bytes(content[:8], "little"))
    return min(len(content), _HEADER_BYTES)


def _json_of(file: Path, content: bytes) -> Any:
    """The JSON in a file, or in the header of a safetensors file; None in others."""
    text = content[8 : _header_length(file, content)] if file.suffix == ".safetensors" else content
    try:
        return json.loads(text)
    except ValueError:
        return None


def _with_json(file: Path, content: bytes, document: Any) -> bytes:
    text = json.dumps(document).replace(f'"{_NESTED}"', "[" * 100_000 + "]" * 100_000).encode()
    if file.suffix != ".safetensors":
        return text
    return struct.pack("<Q", len(text)) + text + content[_header_length(file, content) :]


def _spliced(document: Any, rng: random.Random) -> Any:
    """The document with one value replaced, removed, renamed, or moved to where another was."""
    places = list(_places(document))
    if not places:
        return rng.choice(_VALUES)
    inner, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del inner[key]
        case 1 if isinstance(inner, dict):
            inner[rng.choice(["", "x", "a\nb", "x" * 10_000])] = inner.pop(key)
        case 2:
            other, name = rng.choice(places)
            inner[key], other[name] = other[name], inner[key]
            return document if _has_end(document) else rng.choice(_VALUES)
        case 3:
            return rng.choice(_VALUES)
        case _:
            inner[key] = rng.choice(_VALUES)
    return document


def _places(value: Any) -> Any:
    """All pairs of an object and a key, or an array and a place in it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _has_end(document: Any) -> bool:
    """Whether it can be written: a value moved into itself cannot."""
    try:
        json.dumps(document)
    except (ValueError, RecursionError):
        return False
    return True
