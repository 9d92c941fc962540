"""What schemathesis does not know by itself: how to send msgpack."""

from typing import Any

import msgpack
import schemathesis

from app import wire


@schemathesis.serializer(*wire.MSGPACKS)
def pack(context: Any, value: Any) -> bytes:
    """The body of a request. What msgpack cannot hold, like an integer of 70 bits, goes as JSON, which is malformed."""
    try:
        packed: bytes = msgpack.packb(value)
    except (OverflowError, ValueError):
        packed = wire.dump_json(value)
    return packed
