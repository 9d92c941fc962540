"""What schemathesis cannot know: how msgpack is sent, and what is neither always served nor always refused."""

from typing import Any

import msgpack
import schemathesis

from app import wire
from encoder import BUILT_IN


@schemathesis.serializer(*wire.MSGPACKS)
def pack(context: Any, value: Any) -> bytes:
    """The body of a request."""
    packed: bytes = msgpack.packb(value)
    return packed


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leave out what msgpack cannot hold, and what tokens or time decide, see app/routes/described.py."""
    body = case.body
    if case.media_type in wire.MSGPACKS and not _is_packable(body):
        return False
    prompts = body.get("prompt") if isinstance(body, dict) else body
    if case.path in ("/te", "/predict") and isinstance(prompts, list) and len(prompts) > 1:
        return False
    return not isinstance(body, dict) or not (_has_small_window(body) or _has_little_time(body))


def _is_packable(value: Any) -> bool:
    try:
        return bool(msgpack.packb(value))
    except (OverflowError, TypeError, ValueError):  # an integer of 70 bits; no body
        return False


def _has_small_window(body: dict[str, Any]) -> bool:
    preset, window = body.get("preset"), body.get("max_sequence_length")
    if not isinstance(preset, str) or preset not in BUILT_IN or not isinstance(window, int | float):
        return False
    found = BUILT_IN.get(preset)
    return found.overlong == "refused" and 1 <= window < found.max_sequence_length


def _has_little_time(body: dict[str, Any]) -> bool:
    timeout_ms = body.get("timeout_ms")
    return isinstance(timeout_ms, int | float) and 1 <= timeout_ms < 10_000
