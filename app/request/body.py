"""Reads a request body within its limits of size and time, parses it by its content type, and checks its fields."""

from typing import Any, NoReturn, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from app import wire
from app.errors import BodyTooLarge, ClientDisconnected, MalformedBody, UnsupportedMediaType
from app.profile import stage
from app.request.bounds import MAX_VALUES
from app.request.charset import UTF_8, charset_of, decode
from app.request.deadline import limited, received_at, set_deadline
from app.request.json_body import parse_json
from app.request.msgpack_body import parse_msgpack
from app.request.packed import coding_of, unpack
from app.settings import Settings
from app.threads import PARSER, on

READABLE = (wire.JSON, *wire.MSGPACKS)
MAX_PARSED_ON_LOOP = 64 * 1024  # bytes; less takes less than half a millisecond
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body], settings: Settings) -> Body:
    """The body as `model`, within the limits of the settings. From then on the request has a deadline, see deadline_of.

    A large body is parsed on a thread, one after the other: the event loop goes on, and the memory that parsing takes
    is that of one body.

    Errors: UnsupportedMediaType, BodyTooLarge, BodyTimeout, MalformedBody, ClientDisconnected, DeadlineExceeded, and
    RequestValidationError as FastAPI raises it for a body that does not fit.
    """
    media_type, charset = _media_type(request)
    coding = coding_of(request)
    with stage("receive"):
        if received_at(request) is not None:
            body = await _read(request, settings.max_body_bytes)
        else:  # another server than ours, which may wait for ever
            async with limited(set_deadline(request, settings), "body"):
                body = await _read(request, settings.max_body_bytes)
    with stage("parse"):
        if coding or len(body) > MAX_PARSED_ON_LOOP:
            async with limited(set_deadline(request, settings), "body"):
                fields = await on(PARSER, _understand, body, coding, media_type, charset, model, settings)
        else:
            fields = _understand(body, coding, media_type, charset, model, settings)
    deadline = set_deadline(request, settings, getattr(fields, "timeout_ms", None))
    if not deadline.left_s():
        raise deadline.exceeded("body")
    return fields


def _understand(body: bytes, coding: str, media_type: str, charset: str, model: type[Body], settings: Settings) -> Body:
    """From bytes to checked fields."""
    if coding:
        body = unpack(body, coding, settings.max_body_bytes)
    if not body:
        raise MalformedBody("The body is empty, expected an object.", f"Send one as {' or '.join(READABLE[:2])}.")
    document = parse(body, media_type, charset, settings.max_prompts + MAX_VALUES)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
        raise RequestValidationError(problems, body=document) from error


def parse(body: bytes, media_type: str, charset: str, max_values: int) -> Any:
    """The document in a body, any value. Errors: MalformedBody, BodyTooLarge."""
    if media_type == wire.JSON:
        return parse_json(decode(body, charset), max_values)
    return parse_msgpack(body, max_values)


def _media_type(request: Request) -> tuple[str, str]:
    """The content type, and its charset. Requiring one keeps out the forms that any web page may post."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in READABLE:
        hint = "curl -d sends a form unless told otherwise: add -H 'content-type: application/json'."
        raise UnsupportedMediaType(
            f"content-type: {media_type[:100]!r} is not read here, expected one of {', '.join(READABLE)}.",
            hint if media_type == "application/x-www-form-urlencoded" else "Set the content-type header.",
        )
    return media_type, charset_of(content_type) if media_type == wire.JSON else UTF_8


async def _read(request: Request, max_bytes: int) -> bytes:
    """The whole body. It is refused unread if it declares too many bytes, or as soon as it has sent too many.

    Limits of its time and of the memory of all bodies are our server's: `receive` raises where they are exceeded.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        _refuse(max_bytes, f"{int(declared):,} bytes")
    parts: list[bytes] = []
    received, more = 0, True
    while more:
        part = await request.receive()
        if part["type"] == "http.disconnect":
            raise ClientDisconnected("The client disconnected while it sent the body.")
        parts.append(part.get("body", b""))
        received += len(parts[-1])
        if received > max_bytes:
            _refuse(max_bytes, "more")
        more = part.get("more_body", False)
    return b"".join(parts)  # which copies nothing where it is one part


def _refuse(max_bytes: int, found: str) -> NoReturn:
    raise BodyTooLarge(f"The body may have {max_bytes:,} bytes, it has {found}.", "Send fewer prompts in one request.")
