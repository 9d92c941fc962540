"""Chooses the format of a reply from the Accept header. Source: RFC 9110, section 12.5.1."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from starlette.requests import Request

from app.errors import NotAcceptable

MAX_LENGTH = 2000  # characters of the header; browsers send 150


class MediaRange(NamedTuple):
    """One entry of an Accept header: `type/subtype`, `type/*` or `*/*`, with its weight."""

    name: str
    weight: float

    def specificity(self, media_type: str) -> int:
        """How closely this range matches a media type; 0 where it does not match."""
        if self.name == media_type:
            return 3
        if self.name == media_type.partition("/")[0] + "/*":
            return 2
        return 1 if self.name == "*/*" else 0


def negotiate(request: Request, offered: tuple[str, ...]) -> str:
    """The offered media type that the client prefers; the first one where there is no Accept header.

    Among equal weights a type asked for by name wins over one that a wildcard matches, then the order of `offered`
    decides. Errors: NotAcceptable, naming all that is offered; for a header above MAX_LENGTH as well.
    """
    header = ",".join(request.headers.getlist("accept"))
    if len(header) > MAX_LENGTH:
        message = f"accept: it has {len(header):,} characters, {MAX_LENGTH:,} are read."
        raise NotAcceptable(message, f"Available are {', '.join(offered)}.")
    return _choose(header, offered)


@lru_cache(maxsize=64)  # a client sends the same header each time
def _choose(header: str, offered: tuple[str, ...]) -> str:
    ranges = parse_accept(header) if header.strip() else [MediaRange("*/*", 1.0)]
    ranked = [(*_preference(media_type, ranges), -place, media_type) for place, media_type in enumerate(offered)]
    weight, _, _, best = max(ranked)
    if weight == 0:
        raise NotAcceptable(f"accept: {header[:100]!a} is not available.", f"Available are {', '.join(offered)}.")
    return best


def parse_accept(header: str) -> list[MediaRange]:
    """The ranges of an Accept header. Parameters other than the weight, and entries that do not parse, are ignored."""
    ranges = []
    for entry in header.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        if "/" in name:
            ranges.append(MediaRange(name, _weight(parameters)))
    return ranges


def _weight(parameters: Sequence[str]) -> float:
    """The value of `q`, 0 to 1. A value that is not one of those excludes the media type."""
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0 <= weight <= 1 else 0.0
    return 1.0


def _preference(media_type: str, ranges: Sequence[MediaRange]) -> tuple[float, int]:
    """The weight of the most specific range that matches, and its specificity."""
    matching = [(r.specificity(media_type), r.weight) for r in ranges if r.specificity(media_type)]
    specificity, weight = max(matching, default=(0, 0.0))
    return weight, specificity
