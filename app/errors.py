"""How every error becomes a response: one table from class to status and code, one JSON body for all.

`HANDLERS` are FastAPI exception handlers. `app.add_exception_handler` replaces one, or adds one for a class of its own.

ServiceError: what can go wrong in HTTP itself; the encoder's own errors are in `encoder.errors`
 ├─ MalformedRequest       what came is not HTTP/1
 ├─ MalformedHost          the Host header is not of the form host[:port]
 ├─ HeadTimeout            target and headers did not arrive in time
 ├─ TargetTooLong          target and headers are over the limit, by the target
 ├─ HeadersTooLarge        target and headers are over the limit, by the headers
 ├─ ExpectationFailed      the Expect header asks for what is not there
 ├─ MalformedBody          the body is not what its content type says
 ├─ Unauthorized           the API key is missing or wrong
 ├─ OriginNotAllowed       a web page of another origin asks
 ├─ NotAcceptable          the client accepts none of the formats of this route
 ├─ BodyTimeout            the body did not arrive in time
 ├─ BodyTooLarge           the body is over the limit
 ├─ ResponseTooLarge       the reply would be over the limit of its format
 ├─ UnsupportedMediaType   the body is of a type that this route does not read
 ├─ HostNotAllowed         the Host header names another host: DNS rebinding, or a proxy that passes its own name on
 └─ ClientDisconnected     the client is gone; its status appears in the log only
"""

import inspect
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from app import profile, wire
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
    """Base of the errors in HTTP itself.

    Args:
        message: what was found and what was expected.
        hint: the next step.
        headers: of the response.
    """

    def __init__(self, message: str, hint: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.headers = headers


class MalformedRequest(ServiceError):
    """What came is not HTTP/1; the connection is closed."""


class MalformedHost(ServiceError):
    """The Host header is not of the form host[:port]."""


class HeadTimeout(ServiceError):
    """Target and headers did not arrive in time; the connection is closed."""


class TargetTooLong(ServiceError):
    """Target and headers are over the limit, by the target; the connection is closed."""


class HeadersTooLarge(ServiceError):
    """Target and headers are over the limit, by the headers; the connection is closed."""


class ExpectationFailed(ServiceError):
    """The Expect header asks for something other than 100-continue; the connection is closed."""


class TooManyBytes(Overloaded):
    """Bodies in arrival, or replies in flight, hold all the memory that they may.

    Args:
        message, retry_after_s: as in Overloaded.
        headers: of the response.
    """

    def __init__(self, message: str, retry_after_s: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.headers = headers


class MalformedBody(ServiceError):
    """The body is empty, or does not parse."""


class Unauthorized(ServiceError):
    """The API key is missing or wrong."""


class OriginNotAllowed(ServiceError):
    """A web page of another origin asks for work."""


class NotAcceptable(ServiceError):
    """The Accept header allows none of the formats of this route."""


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
    """The client disconnected before its reply was ready."""


class Answer(NamedTuple):
    """Status and code of the response to a class of errors."""

    status: int
    code: str


ANSWERS: dict[type[Exception], Answer] = {
    MalformedRequest: Answer(400, "malformed_request"),
    MalformedHost: Answer(400, "malformed_host"),
    MalformedBody: Answer(400, "malformed_body"),
    HeadTimeout: Answer(408, "head_timeout"),
    TargetTooLong: Answer(414, "target_too_long"),
    ExpectationFailed: Answer(417, "expectation_failed"),
    HeadersTooLarge: Answer(431, "headers_too_large"),
    Unauthorized: Answer(401, "unauthorized"),
    OriginNotAllowed: Answer(403, "origin_not_allowed"),
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
    TooManyBytes: Answer(429, "too_many_bytes"),
    ClientDisconnected: Answer(499, "client_disconnected"),  # nginx's number; no client receives it
    ModelFailure: Answer(500, "inference_failed"),
    NotReady: Answer(503, "not_ready"),
    Overloaded: Answer(503, "overloaded"),
    DeadlineExceeded: Answer(504, "deadline_exceeded"),
}
UNEXPECTED = Answer(500, "internal_error")
NO_ROUTE = Answer(404, "not_found")
NO_METHOD = Answer(405, "method_not_allowed")
OTHER_CODES = (NO_ROUTE.code, NO_METHOD.code, "http_error", UNEXPECTED.code)  # of errors that are no class of ours
MAX_MESSAGE = 1000  # characters


def answer(error: Exception) -> Answer:
    """Status and code for an error: those of its class, or of the nearest base class in the table."""
    return next((ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS), UNEXPECTED)


def error_response(error: Exception) -> Response:
    """The response to an error in the table. Any other error gets 500 without details."""
    status, code = answer(error)
    if (status, code) == UNEXPECTED:
        return error_body(status, code, "Unexpected error; the service's log has it under this request's x-request-id.")
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, DeadlineExceeded):
        profile.expire(error.stage)
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(error.retry_after_s)
    return error_body(status, code, str(error), getattr(error, "hint", None), headers)


def error_body(
    status: int, code: str, message: str, hint: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """`{"error": {"code", "message", "hint"?}}`. The code is noted in the request's profile."""
    profile.fail(code)
    if len(message) > MAX_MESSAGE:  # a value found can be of any length; keep the end, which says what is allowed
        message = f"{message[: MAX_MESSAGE // 2]} … {message[-MAX_MESSAGE // 2 :]}"
    error = {"code": code, "message": message} | ({"hint": hint} if hint else {})
    return Response(wire.dump_json({"error": error}), status, headers, media_type=wire.JSON)


async def answer_outside_routes(app: FastAPI, request: Request, error: Exception) -> Response:
    """The response of the app's own handler for this error. Logs an error that no handler expects.

    Inside routes Starlette does the same; this is for errors that middleware raised, and for bugs.
    """
    handlers: Mapping[Any, Any] = app.exception_handlers  # by class, or by status
    handler = next((handlers[cls] for cls in type(error).__mro__ if cls in handlers and cls is not Exception), None)
    if handler is None:
        logger.error("request %s failed", request.scope["request_id"], exc_info=error)
        handler = handlers.get(500) or handlers[Exception]
    if inspect.iscoroutinefunction(handler):
        response: Response = await handler(request, error)
    else:
        response = await run_in_threadpool(handler, request, error)
    return response


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_known(request: Request, error: Exception) -> Response:
    if answer(error).status == 500:
        logger.error("request %s: %s: %s", request.scope.get("request_id"), type(error).__name__, error)
    return error_response(error)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_body(422, "invalid_field", *describe(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    """Errors of routing: an unknown path or method. OPTIONS is answered here, because no route has it."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404:
        return error_body(*NO_ROUTE, f"{path} does not exist.", "GET /docs lists all routes.")
    if error.status_code != 405:
        return error_body(error.status_code, "http_error", str(error.detail), headers=error.headers)
    allowed = _allowed(dict(error.headers or {}).get("Allow", ""))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": allowed})
    message = f"{path} does not take {request.method}, it takes {allowed}."
    return error_body(*NO_METHOD, message, headers={"allow": allowed})


def _allowed(methods: str) -> str:
    names = {name.strip() for name in methods.split(",") if name.strip()} | {"OPTIONS"}
    return ", ".join(sorted(names | ({"HEAD"} if "GET" in names else set())))


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    ServiceError: _on_known,
    EncoderError: _on_known,
    RequestValidationError: _on_validation,
    HTTPException: _on_http,
    Exception: _on_unexpected,
}
