"""What a body may hold, whatever its format: how many values, how deep, and each key of an object once.

Bytes alone bound nothing: two million of them can be a million values, which take 100 times their memory once they are
parsed. So values are counted before they are made, and a body that has too many is refused for a few bytes read.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

from app.errors import BodyTooLarge, MalformedBody
from app.request.validation import shorten

MAX_VALUES = 2000  # besides the prompts: fields, layers, and what other services' clients send and is ignored here
MAX_DEPTH = 64  # objects and lists within each other; ours have two
MAX_KEYS = 256  # of one object; pydantic describes each unknown field


def refuse_many(max_values: int) -> NoReturn:
    """Errors: BodyTooLarge."""
    raise BodyTooLarge(f"The body may have {max_values:,} values, it has more.", "Send fewer prompts in one request.")


def refuse_deep() -> NoReturn:
    """Errors: MalformedBody."""
    raise MalformedBody(f"The body is nested too deeply: more than {MAX_DEPTH} objects and lists within each other.")


def as_object(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """The object of these pairs of key and value.

    A key that comes twice is refused: readers do not agree on which of its values counts (RFC 8259, section 4), so
    what a proxy has checked may not be what is served.

    Errors: MalformedBody, naming the key; BodyTooLarge.
    """
    if len(pairs) > MAX_KEYS:
        raise BodyTooLarge(
            f"An object of the body may have {MAX_KEYS} keys, it has {len(pairs):,}.", "Send only the fields in /docs."
        )
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise MalformedBody(f"The body has the key {shorten(twice)} twice in one object.", "Send each key once.")
    return found
