"""How every failure is answered: one table from error class to status and code, one JSON body for all.

ServiceError: what HTTP itself can get wrong; the encoder's own errors are in `encoder.errors`
 ├─ MalformedBody          the body is not what its content type says
 ├─ Unauthorized           the API key is missing or wrong
 ├─ NotAcceptable          no format that the client accepts
 ├─ BodyTimeout            the body did not arrive in time
 ├─ BodyTooLarge           the body is over the limit
 ├─ ResponseTooLarge       the reply would be over the limit of its format
 ├─ UnsupportedMediaType   the body is of a type that this route does not read
 ├─ HostNotAllowed         the Host header names another host: DNS rebinding, or a proxy that is not configured
 └─ ClientDisconnected     the client went away; nobody reads the answer, the log does
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app import wire
from app.request.validation import describe
from encoder import (
    DeadlineExceeded,
    EncoderError,
    InvalidField,
    ModelFailure,
    NotReady,
    Overloaded,
    QueueFull,
    RequestError,
    RequestTooLarge,
)

logger = logging.getLogger(__name__)


class ServiceError(Exception):
    """Base of the errors of HTTP itself.

    Args:
        message: what was found and what was expected.
        hint: the next step.
        headers: of the response.
    """

    def __init__(self, message: str, hint: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.headers = headers


class MalformedBody(ServiceError):
    """The body is empty, or does not parse."""


class Unauthorized(ServiceError):
    """The API key is missing or wrong."""


class NotAcceptable(ServiceError):
    """The Accept header allows no format that this route has."""


class BodyTimeout(ServiceError):
    """The body did not arrive in time."""


class BodyTooLarge(ServiceError):
    """The body is over the limit."""


class ResponseTooLarge(ServiceError):
    """The reply would be over the limit of its format."""


class UnsupportedMediaType(ServiceError):
    """The body is of a type that this route does not read."""


class HostNotAllowed(ServiceError):
    """The Host header names a host that this service is not."""


class ClientDisconnected(ServiceError):
    """The client went away before its answer was there."""


class Answer(NamedTuple):
    """How an error class is answered."""

    status: int
    code: str


ANSWERS: dict[type[Exception], Answer] = {
    MalformedBody: Answer(400, "malformed_body"),
    Unauthorized: Answer(401, "unauthorized"),
    NotAcceptable: Answer(406, "not_acceptable"),
    BodyTimeout: Answer(408, "body_timeout"),
    BodyTooLarge: Answer(413, "body_too_large"),
    RequestTooLarge: Answer(413, "request_too_large"),
    ResponseTooLarge: Answer(413, "response_too_large"),
    UnsupportedMediaType: Answer(415, "unsupported_media_type"),
    HostNotAllowed: Answer(421, "host_not_allowed"),
    InvalidField: Answer(422, "invalid_field"),
    RequestError: Answer(422, "invalid_request"),
    QueueFull: Answer(429, "queue_full"),
    ClientDisconnected: Answer(499, "client_disconnected"),  # nginx's number; never reaches anybody
    ModelFailure: Answer(500, "inference_failed"),
    NotReady: Answer(503, "not_ready"),
    Overloaded: Answer(503, "overloaded"),
    DeadlineExceeded: Answer(504, "deadline_exceeded"),
}
UNEXPECTED = Answer(500, "internal_error")
MAX_MESSAGE = 1000  # characters


def answer(error: Exception) -> Answer:
    """Status and code of an error: its own, or those of the nearest base that has any."""
    return next((ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS), UNEXPECTED)


def error_response(error: Exception) -> Response:
    """The response to an error of the table; to any other error, 500 without details."""
    status, code = answer(error)
    if (status, code) == UNEXPECTED:
        return error_body(status, code, "Unexpected error; the log has it under this request's x-request-id.")
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    return error_body(status, code, str(error), getattr(error, "hint", None), headers)


def error_body(
    status: int, code: str, message: str, hint: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """`{"error": {"code", "message", "hint"?}}`."""
    if len(message) > MAX_MESSAGE:  # what was found can be of any length; what is allowed stands at the end
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 2 :]}"
    error = {"code": code, "message": message} | ({"hint": hint} if hint else {})
    return Response(wire.dump_json({"error": error}), status, headers, media_type=wire.JSON)


def install(app: FastAPI) -> None:
    """Answer every error that a route raises by the table."""
    for cls, handler in HANDLERS.items():
        app.add_exception_handler(cls, handler)
    app.add_exception_handler(Exception, _on_bug)


async def answer_error(request: Request, error: Exception) -> Response:
    """What FastAPI answers where `install` has been called. Errors: the same again where nothing is known of it."""
    for cls in type(error).__mro__:
        if cls in HANDLERS:
            return await HANDLERS[cls](request, error)
    raise error


async def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises the error again when this has been sent, and RequestContext logs it."""
    return error_response(error)


async def _on_known(request: Request, error: Exception) -> Response:
    if answer(error).status == 500:
        logger.error("request %s: %s: %s", request.scope.get("request_id"), type(error).__name__, error)
    return error_response(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, ValidationError | RequestValidationError)
    return error_body(422, "invalid_field", *describe(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    """Errors of routing: no such route, no such method."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404:
        return error_body(404, "not_found", f"{path} does not exist.", "GET /docs lists all routes.")
    if error.status_code != 405:
        return error_body(error.status_code, "http_error", str(error.detail), headers=error.headers)
    allowed = _allowed(dict(error.headers or {}).get("Allow", ""))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": allowed})
    message = f"{path} does not take {request.method}, it takes {allowed}."
    return error_body(405, "method_not_allowed", message, headers={"allow": allowed})


def _allowed(methods: str) -> str:
    names = {name.strip() for name in methods.split(",") if name.strip()} | {"OPTIONS"}
    return ", ".join(sorted(names | ({"HEAD"} if "GET" in names else set())))


HANDLERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    ServiceError: _on_known,
    EncoderError: _on_known,
    ValidationError: _on_validation,
    RequestValidationError: _on_validation,
    HTTPException: _on_http,
}
