"""The parts of messages for people: what comes from files of strangers is cut, and every message is one line."""

import re
from collections.abc import Iterable

_LONG = re.compile(r"([^\s/]{100})[^\s/]{200,}")  # longer than the name of any file
_PAGE = 4000  # characters
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """The text as one line that every output can write.

    Line breaks, control characters and halves of surrogate pairs, which names in files and words of libraries may have,
    are escaped. What is longer than the name of a file is cut, and so is the middle of what is longer than a page.
    """
    text = _LONG.sub(r"\1…", text)
    if len(text) > _PAGE:
        text = f"{text[: _PAGE // 2]} … {text[-_PAGE // 2 :]}"
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def shown(value: object, limit: int = 80) -> str:
    """A value as Python writes it, cut to `limit` characters."""
    return _cut(repr(value), limit)


def listed(items: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first `limit` items, and how many there are more."""
    items = list(items)
    more = f"{separator}and {len(items) - limit:,} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def said(error: BaseException, limit: int = 300) -> str:
    """What an error of a library says, on one line and cut to `limit` characters; its class where it says nothing."""
    return _cut(" ".join(str(error).split()), limit) or type(error).__name__


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
