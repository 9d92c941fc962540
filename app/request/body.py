"""Reads a request body within its limits of size and time, parses it by its content type, and checks its fields."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

import msgpack
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from app import wire
from app.errors import BodyTimeout, BodyTooLarge, ClientDisconnected, MalformedBody, UnsupportedMediaType
from app.profile import stage
from app.request.charset import UTF_8, charset_of, decode
from app.request.packed import coding_of, unpack
from app.settings import Settings

READABLE = (wire.JSON, *wire.MSGPACKS)
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body], settings: Settings) -> Body:
    """The body as `model`, within the limits of the settings.

    Errors: those of `read_document`, and RequestValidationError as FastAPI raises it for a body that does not fit.
    """
    document = await read_document(request, settings.max_body_bytes, settings.body_timeout_s)
    with stage("parse"):
        try:
            return model.model_validate(document)
        except ValidationError as error:
            problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
            raise RequestValidationError(problems, body=document) from error


async def read_document(request: Request, max_bytes: int, timeout_s: float) -> Any:
    """The parsed body, any JSON value.

    Errors: UnsupportedMediaType, BodyTooLarge, BodyTimeout, MalformedBody, ClientDisconnected.
    """
    media_type, charset = _media_type(request)
    coding = coding_of(request)
    with stage("receive"):
        body = await _read(request, max_bytes, timeout_s)
        if coding:
            body = await asyncio.to_thread(unpack, body, coding, max_bytes)
    if not body:
        raise MalformedBody("The body is empty, expected an object.", f"Send one as {' or '.join(READABLE[:2])}.")
    with stage("parse"):
        return _parse_json(body, charset) if media_type == wire.JSON else _parse_msgpack(body)


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


async def _read(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. It is refused unread if it declares too many bytes, or as soon as it has sent too many."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        _refuse(max_bytes, f"{int(declared):,} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            more = True
            while more:
                part = await request.receive()
                if part["type"] == "http.disconnect":
                    raise ClientDisconnected("The client disconnected while it sent the body.")
                body += part.get("body", b"")
                more = part.get("more_body", False)
                if len(body) > max_bytes:
                    _refuse(max_bytes, "more")
    except TimeoutError as error:
        message = f"The body did not arrive within {timeout_s:g} s."
        raise BodyTimeout(message, "Send it faster, or smaller.", {"connection": "close"}) from error
    return bytes(body)


def _refuse(max_bytes: int, found: str) -> NoReturn:
    raise BodyTooLarge(f"The body may have {max_bytes:,} bytes, it has {found}.", "Send fewer prompts in one request.")


def _parse_json(body: bytes, charset: str) -> Any:
    text = decode(body, charset)
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedBody(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise MalformedBody("The body is nested too deeply.") from error
    except ValueError as error:  # NaN or Infinity, or an integer of thousands of digits
        raise MalformedBody(f"The body is not JSON: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value.")


DECODER = json.JSONDecoder(parse_constant=_no_constant)  # making one takes longer than using it


def _parse_msgpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body)
    except UnicodeDecodeError as error:
        raise MalformedBody(f"The body has a string that is not UTF-8: {error.reason}.") from error
    except msgpack.ExtraData as error:
        raise MalformedBody("The body goes on after the end of its msgpack value.") from error
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or "nested too deeply, or not a msgpack value"
        raise MalformedBody(f"The body is not msgpack: {reason}.") from error
