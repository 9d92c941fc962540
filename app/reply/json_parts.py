"""Writes JSON in parts, each of which is made in about a millisecond, however large the document is."""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from app.wire import Tensor, Written, dump_json, is_in_parts

AT_ONCE = 1000  # numbers that are written by one call
BASE64_AT_ONCE = 3 * 64 * 1024  # bytes; a multiple of 3, so that the texts of all pieces make one


@dataclass(frozen=True, slots=True)
class Base64:
    """The base64 text of some bytes, made while it is sent: until then it takes no memory.

    Its length is that of the text; iterating gives the text in pieces.
    """

    data: memoryview

    def __len__(self) -> int:
        return (len(self.data) + 2) // 3 * 4

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), BASE64_AT_ONCE):
            yield base64.b64encode(self.data[start : start + BASE64_AT_ONCE])


Part = bytes | memoryview | Base64


def in_base64(tensor: Tensor) -> Written:
    """The bytes of a tensor, as a string."""
    return Written([b'"', Base64(tensor.tobytes()), b'"'])


def in_numbers(tensor: Tensor) -> Written:
    """A tensor as nested lists of numbers."""
    return Written([*_lists(tensor.numbers())])


def json_parts(document: Mapping[str, Any], data: Callable[[Tensor], Written] = in_base64) -> list[Part]:
    """The document as JSON, in parts: what `dump_json` writes, with each Tensor as {dtype, shape, data}."""
    return [*_parts(document, data)]


def _parts(value: Any, data: Callable[[Tensor], Written]) -> Iterable[Part]:
    if isinstance(value, Tensor):
        value = {"dtype": value.dtype, "shape": list(value.array.shape), "data": data(value)}
    if isinstance(value, Written):
        return value.parts
    if isinstance(value, Mapping):
        return _within(b"{}", _members(value, data))
    return _within(b"[]", (_parts(item, data) for item in value))  # a list of objects


def _members(document: Mapping[str, Any], data: Callable[[Tensor], Written]) -> Iterator[Iterable[Part]]:
    """The members of an object: neighbours that one call can write together, others one by one."""
    plain: dict[str, Any] = {}
    for key, value in document.items():
        if not is_in_parts(value):
            plain[key] = value
            continue
        if plain:
            yield (dump_json(plain)[1:-1],)
            plain = {}
        yield (dump_json(key) + b":", *_parts(value, data))
    if plain:
        yield (dump_json(plain)[1:-1],)


def _within(brackets: bytes, items: Iterable[Iterable[Part]]) -> Iterator[Part]:
    yield brackets[:1]
    for place, item in enumerate(items):
        if place:
            yield b","
        yield from item
    yield brackets[1:]


def _lists(array: NDArray[Any]) -> Iterator[Part]:
    """What `array.tolist()` would be."""
    numbers_in_row = array.size // max(len(array), 1)
    if numbers_in_row > AT_ONCE:
        yield from _within(b"[]", (_lists(row) for row in array))
    else:
        rows = AT_ONCE // max(numbers_in_row, 1)
        slices = (array[start : start + rows].tolist() for start in range(0, len(array), rows))
        yield from _within(b"[]", ([dump_json(part)[1:-1]] for part in slices))
