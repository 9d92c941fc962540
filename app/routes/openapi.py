"""What FastAPI cannot see for its API description: bodies that routes read themselves, replies in several formats."""

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from app import wire
from app.errors import ANSWERS, NO_METHOD, UNEXPECTED
from app.reply.formats import FORMATS
from app.reply.reply import ENCODINGS
from app.request.schemas import (
    EncodeLayersRequest,
    EncodeReply,
    EncodeRequest,
    ErrorReply,
    TokenizeReply,
    TokenizeRequest,
)

Described = dict[str, Any]
EVERYWHERE = (400, 403, 405, 408, 414, 417, 421, 431, 500, 503)  # before a route is reached, or on any
HEADERS = {
    "allow": {"description": "The methods that this path takes.", "schema": {"type": "string"}},
    "retry-after": {"description": "Seconds after which to try again.", "schema": {"type": "integer", "minimum": 0}},
    "www-authenticate": {"description": "How to send the API key.", "schema": {"type": "string"}},
}
HEADERS_OF_ERRORS = {"allow": (405,), "retry-after": (429, 503), "www-authenticate": (401,)}
_CODES = dict.fromkeys([*ANSWERS.values(), UNEXPECTED, NO_METHOD])


def errors(*statuses: int) -> dict[int | str, Described]:
    """The error replies of a route: these, and those that every route has."""
    return {status: _error(status) for status in sorted({*statuses, *EVERYWHERE})}


def _error(status: int) -> Described:
    codes = " | ".join(answer.code for answer in _CODES if answer.status == status)
    headers = {name: HEADERS[name] for name, statuses in HEADERS_OF_ERRORS.items() if status in statuses}
    return {"model": ErrorReply, "description": f"code: {codes}", "headers": headers}


def request_body(model: type[BaseModel], examples: dict[str, Any]) -> Described:
    """The request body in each media type. No model here refers to another, so its schema needs no definitions."""
    schema = model.model_json_schema()
    named = {name: {"value": value} for name, value in examples.items()}
    return {
        "required": True,
        "content": {
            wire.JSON: {"schema": schema} | ({"examples": named} if named else {}),
            **{media_type: {"schema": schema} for media_type in wire.MSGPACKS},
        },
    }


BYTES = {"schema": {"type": "string", "format": "binary"}}
TIMINGS: Described = {
    name: {"description": text, "schema": {"type": kind}}
    for name, text, kind in [
        ("x-request-id", "The id that the request brought, or a new one.", "string"),
        ("x-total-time", "Milliseconds from the first byte of the request to this header.", "number"),
        ("x-tokenization-time", "Milliseconds.", "number"),
        ("x-queue-time", "Milliseconds.", "number"),
        ("x-inference-time", "Milliseconds.", "number"),
        ("x-cache", "hit (in memory or on disk), miss or coalesced.", "string"),
    ]
}
ENCODED: Described = {
    "model": EncodeReply,
    "description": "Hidden states, in the format that the Accept header asks for; msgpack by default.",
    "headers": TIMINGS,
    "content": {media_type: BYTES for media_type in FORMATS if media_type != wire.JSON},  # JSON is the model
}
ENCODING: Described = {
    "name": "encoding",
    "in": "query",
    "description": "How a JSON reply contains tensors; other formats ignore it.",
    "schema": {"type": "string", "enum": list(ENCODINGS), "default": ENCODINGS[0]},
}
FAILURES = errors(401, 406, 413, 415, 422, 429, 504)


def drop_in(
    body: type[BaseModel], examples: dict[str, Any], media_type: str, reply: type[BaseModel] | str
) -> Described:
    """A route that speaks the protocol of another service: one format of reply, the errors of all routes.

    Args:
        reply: the model of a reply in JSON, or what the bytes of any other reply are.
    """
    if isinstance(reply, str):
        content: Described = {"description": reply, "content": {media_type: BYTES}}
    else:
        content = {"description": reply.__doc__, "model": reply}
    return {
        "responses": {200: content | {"headers": TIMINGS}, **FAILURES},
        "response_class": Response,
        "openapi_extra": {"requestBody": request_body(body, examples)},
    }


ENCODE: Described = {
    "responses": {200: ENCODED, **FAILURES},
    "openapi_extra": {
        "parameters": [ENCODING],
        "requestBody": request_body(
            EncodeRequest,
            {
                "one prompt": {"prompt": "a cat on a red sofa"},
                "FLUX.2 klein, with the usual negative": {"prompts": ["a cat", ""], "preset": "flux2-klein"},
                "Z-Image in float32": {"prompt": "a cat", "preset": "z-image", "dtype": "float32"},
            },
        ),
    },
}
ENCODE_LAYERS: Described = {
    "responses": {200: ENCODED, **FAILURES},
    "openapi_extra": {
        "parameters": [ENCODING],
        "requestBody": request_body(
            EncodeLayersRequest,
            {
                "decoder layers, joined": {"prompt": "a cat", "layers": [8, 17, 26]},
                "Hugging Face's index, stacked": {"prompt": "a cat", "hidden_states": [9, 18, -1], "combine": "stack"},
            },
        ),
    },
}
TOKENIZE: Described = {
    "responses": {
        200: {"model": TokenizeReply, "description": "The tokens.", "content": {wire.MSGPACK: BYTES}},
        **errors(401, 406, 413, 415, 422, 429, 504),
    },
    "openapi_extra": {
        "requestBody": request_body(TokenizeRequest, {"one prompt": {"prompt": "a cat", "preset": "flux2-klein"}})
    },
}
