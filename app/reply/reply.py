"""From the results of a request to its response: choose a format, collate the prompts, send the body in parts.

The formats themselves are in a file of their own, `formats.py`, because that is the one file a new format touches.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app import wire
from app.errors import NotAcceptable, ResponseTooLarge
from app.http.budget import hold_of
from app.profile import stage
from app.reply.formats import FORMATS, JSON_FLOATS, Body, Document, Format
from app.reply.json_parts import Base64, Part
from app.request.accept import negotiate
from app.request.deadline import limited
from app.request.query import read_query
from app.request.validation import shorten
from app.settings import Settings
from app.threads import BUILDER, on
from app.wire import Tensor
from encoder import Deadline, InvalidField, PromptEmbeds

ENCODINGS = ("base64", "float")
MAX_COPY_ON_LOOP = 256 * 1024  # bytes; copying more holds up the event loop for a noticeable time
JOIN_BELOW = 64 * 1024  # bytes; copying a smaller part costs less than sending it as a message of its own


def choose_format(request: Request, settings: Settings) -> Format:
    """The format that the Accept header and `?encoding=` ask for.

    Errors: NotAcceptable, InvalidField, TargetTooLong.
    """
    encoding = read_query(request, ("encoding",)).get("encoding", ENCODINGS[0])
    if encoding not in ENCODINGS:
        raise InvalidField("encoding", f"expected {' or '.join(ENCODINGS)}, found {shorten(encoding)}.")
    media_type = negotiate(request, tuple(FORMATS))
    if media_type == wire.JSON and encoding == "float":
        return replace(JSON_FLOATS, max_numbers=settings.max_json_floats)
    return FORMATS[media_type]


async def respond(
    reply_format: Format,
    embeds: Sequence[PromptEmbeds],
    facts: Document,
    headers: Mapping[str, str] | None = None,
    deadline: Deadline | None = None,
) -> Response:
    """The hidden states of all prompts in this format, with their mask and the facts where the format has room.

    Args:
        headers: to send in addition to those of the format.
        deadline: of the request; None for as long as it takes.
    Errors: ResponseTooLarge, NotAcceptable, DeadlineExceeded.
    """
    _check(reply_format, embeds)
    with stage("serialize"):
        if _copied_bytes(reply_format, embeds) > MAX_COPY_ON_LOOP:
            async with limited(deadline, "reply"):
                parts, own_headers = await on(BUILDER, _build, reply_format, embeds, facts)
        else:
            parts, own_headers = _build(reply_format, embeds, facts)
    return PartsResponse(parts, {**own_headers, **(headers or {})}, reply_format.media_type)


def _check(reply_format: Format, embeds: Sequence[PromptEmbeds]) -> None:
    if not reply_format.has_mask and is_ragged(embeds):
        raise NotAcceptable(
            f"{reply_format.media_type} has no mask, and these prompts have different numbers of rows.",
            "Send one prompt per request, take a preset that pads to its window, or accept application/msgpack.",
        )
    if reply_format.max_numbers is not None:
        check_numbers(len(embeds) * max(prompt.hidden_states.size for prompt in embeds), reply_format.max_numbers)


def check_numbers(numbers: int, allowed: int) -> None:
    """Refuse to write too many numbers as JSON lists. Errors: ResponseTooLarge."""
    if numbers > allowed:
        raise ResponseTooLarge(
            f"encoding: float would be {numbers:,} numbers, allowed are {allowed:,}.",
            "Take base64, or accept application/msgpack.",
        )


def _copied_bytes(reply_format: Format, embeds: Sequence[PromptEmbeds]) -> int:
    """Bytes of hidden states that `_build` copies. One prompt is sent from the memory it is in, if the format can."""
    if len(embeds) == 1 and not reply_format.copies:
        return 0
    return sum(prompt.hidden_states.nbytes for prompt in embeds)


def _build(reply_format: Format, embeds: Sequence[PromptEmbeds], facts: Document) -> tuple[Body, Mapping[str, str]]:
    """Body and headers. Safe on any thread."""
    hidden_states, attention_mask = collate(embeds)
    document = {**facts, "hidden_states": hidden_states, "attention_mask": attention_mask}
    return reply_format.pack(document), reply_format.headers(document)


def collate(prompts: Sequence[PromptEmbeds]) -> tuple[Tensor, Tensor]:
    """hidden_states and attention_mask of all prompts; short ones are padded with zeros on the right.

    Args:
        prompts: (L, D), (n, L, D) or (L, n, D) each, all of one request.
    Returns:
        (B, L, D), (B, n, L, D) or (B, L, n, D) with the longest L, and (B, L) bool. A single prompt is not copied.
    """
    length = max(len(prompt.attention_mask) for prompt in prompts)
    hidden_states = _stack([prompt.hidden_states for prompt in prompts], length, prompts[0].rows_axis)
    attention_mask = _stack([prompt.attention_mask for prompt in prompts], length, 0)
    return Tensor(hidden_states, prompts[0].dtype), Tensor(attention_mask, "bool")


def is_ragged(prompts: Sequence[PromptEmbeds]) -> bool:
    """Whether `collate` pads. Then only the mask tells padding from rows of the prompt."""
    return len({len(prompt.attention_mask) for prompt in prompts}) > 1


def _stack(arrays: Sequence[NDArray[Any]], length: int, axis: int) -> NDArray[Any]:
    """All arrays in one, each padded with zeros to `length` along `axis`."""
    if len(arrays) == 1:
        return arrays[0][None]
    shape = list(arrays[0].shape)
    shape[axis] = length
    out = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for place, array in zip(out, arrays, strict=True):
        place[(slice(None),) * axis + (slice(array.shape[axis]),)] = array
    return out


class PartsResponse(Response):
    """A response whose body is several buffers. Large ones are handed to the server as they are, without a copy."""

    def __init__(self, parts: Body, headers: Mapping[str, str], media_type: str) -> None:
        self.messages = list(joined(parts)) or [b""]
        self.length = sum(map(len, self.messages))
        super().__init__(headers={**headers, "content-length": str(self.length)}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the headers, then each message of the body. Errors: RequestTooLarge, TooManyBytes, before anything."""
        hold_of(scope).cover(sum(len(message) for message in self.messages if not isinstance(message, Base64)))
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sent = 0
        for message in self.messages:
            for body in message if isinstance(message, Base64) else (message,):
                sent += len(body)
                await send({"type": "http.response.body", "body": body, "more_body": sent < self.length})
                if isinstance(message, Base64):
                    await asyncio.sleep(0)  # a client that reads fast must not keep the loop from all others


def joined(parts: Body) -> Iterator[Part]:
    """The same bytes in fewer pieces, none empty: adjacent parts below JOIN_BELOW become one, of less than twice it."""
    small: list[bytes | memoryview] = []
    length = 0
    for part in parts:
        if len(part) >= JOIN_BELOW:
            yield from _one(small)
            small, length = [], 0
            yield part
            continue
        small += part if isinstance(part, Base64) else (part,)
        length += len(part)
        if length >= JOIN_BELOW:
            yield from _one(small)
            small, length = [], 0
    yield from _one(small)


def _one(parts: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    if any(parts):
        yield parts[0] if len(parts) == 1 else b"".join(parts)
