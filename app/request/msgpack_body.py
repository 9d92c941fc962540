"""Parses msgpack, after its values have been counted.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md, "Formats".
"""

from typing import Any

import msgpack

from app.errors import MalformedBody
from app.request.bounds import MAX_DEPTH, as_object, refuse_deep, refuse_many

LISTS = frozenset({*range(0x90, 0xA0), 0xDC, 0xDD})  # first bytes
MAPS = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})
SMALL = 1000  # bytes, in which whatever they declare takes little memory


def parse_msgpack(body: bytes, max_values: int) -> Any:
    """The value of a msgpack body. Errors: MalformedBody, BodyTooLarge."""
    try:
        if len(body) > SMALL:
            check_size(body, max_values)
        return msgpack.unpackb(body, object_pairs_hook=as_object)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body has a string that is not UTF-8: {error.reason}.") from error
    except msgpack.ExtraData as error:
        raise MalformedBody("The body goes on after the end of its msgpack value.") from error
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or "nested too deeply, or not a msgpack value"
        raise MalformedBody(f"The body is not msgpack: {reason}.") from error


def check_size(body: bytes, max_values: int) -> int:
    """The number of values: it stops at the first that is too many, or too deep.

    msgpack makes room for a list as soon as its length is declared, so three bytes can ask for half a megabyte.

    Errors: BodyTooLarge, MalformedBody; ValueError and UnpackException as `unpackb` raises them.
    """
    reader = msgpack.Unpacker(max_buffer_size=len(body))
    reader.feed(body)
    values, missing = 1, [1]  # values that are still to come, at each depth
    while missing:
        if missing[-1] == 0:
            missing.pop()
            continue
        missing[-1] -= 1
        if length := _skip(reader, body):
            values += length
            missing.append(length)
        if length > len(body) - reader.tell():
            raise MalformedBody("The body ends before its msgpack value does.")
        if len(missing) > MAX_DEPTH + 1:
            refuse_deep()
        if values > max_values:
            refuse_many(max_values)
    return values


def _skip(reader: Any, body: bytes) -> int:
    """Read on to the next value, which may be the first of those in a list or map. Return how many these hold."""
    place = reader.tell()
    first = body[place] if place < len(body) else None
    if first in LISTS:
        length: int = reader.read_array_header()
        return length
    if first in MAPS:
        return 2 * int(reader.read_map_header())
    reader.skip()  # raises OutOfData at the end
    return 0
