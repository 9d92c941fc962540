"""The routes that take prompts: accept → body → preset → engine → reply."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.params import Depends
from starlette.responses import Response

from app import wire
from app.http.budget import hold_of
from app.reply.formats import Body
from app.reply.json_parts import json_parts
from app.reply.reply import PartsResponse, choose_format, respond
from app.request.accept import negotiate
from app.request.body import read_body
from app.request.deadline import deadline_of, limited
from app.request.disconnect import unless_disconnected
from app.request.schemas import EncodeLayersRequest, EncodeRequest, TokenizeRequest
from app.routes.direct import DirectRoute
from app.routes.encoding import encode_prompts, timings
from app.routes.openapi import ENCODE, ENCODE_LAYERS, TOKENIZE
from app.service import Service, ServiceDep
from app.threads import BUILDER, on
from encoder import EncodeResult, Engine, Preset, TokenizedPrompt

TOKEN_BYTES = 60  # of a token that waits to be spelled, and of its place in the reply
MAX_TOKENS_ON_LOOP = 1000  # spelling and writing more would hold up the event loop for a noticeable time


async def encode(request: Request, service: ServiceDep) -> Response:
    """Encode prompts to the hidden states of a preset.

    Without a preset: the last hidden state, after the final norm, of the bare prompt.
    """
    return await _encode(request, service, EncodeRequest)


async def encode_layers(request: Request, service: ServiceDep) -> Response:
    """Encode prompts to the hidden states of chosen layers; everything else is as in `/encode`."""
    return await _encode(request, service, EncodeLayersRequest)


async def _encode(request: Request, service: Service, model: type[EncodeRequest]) -> Response:
    """One request from its first header to its reply."""
    reply_format = choose_format(request, service.settings)  # first, so that a refusal costs no work
    body = await read_body(request, model, service.settings)
    preset = body.resolve(service.catalog)
    result = await encode_prompts(request, service, body.texts(), preset, body.dtype)
    facts, deadline = _facts(result, preset, service.engine), deadline_of(request)
    return await respond(reply_format, result.embeds, facts, timings(result), deadline)


async def tokenize(request: Request, service: ServiceDep) -> Response:
    """Show what would be encoded: the formatted prompt and its tokens. Does not run the model."""
    media_type = negotiate(request, (wire.JSON, *wire.MSGPACKS))
    body = await read_body(request, TokenizeRequest, service.settings)
    preset, engine = body.resolve(service.catalog), service.engine
    deadline = deadline_of(request)
    prompts = await unless_disconnected(request, engine.tokenize(body.texts(), preset, deadline))
    if (num_tokens := sum(len(prompt.input_ids) for prompt in prompts)) > MAX_TOKENS_ON_LOOP:
        hold_of(request.scope).take(num_tokens * TOKEN_BYTES)
        async with limited(deadline, "reply"):
            parts = await on(BUILDER, _spell, media_type, prompts, preset, engine)
    else:
        parts = _spell(media_type, prompts, preset, engine)
    return PartsResponse(parts, {}, media_type)


def _spell(media_type: str, prompts: Sequence[TokenizedPrompt], preset: Preset, engine: Engine) -> Body:
    """The reply of /tokenize."""
    document = {
        "model": engine.info.model,
        "preset": preset.name,
        "prompts": [_tokenized(prompt, engine) for prompt in prompts],
    }
    return json_parts(document) if media_type == wire.JSON else wire.pack_parts(document)


ROUTES = (
    ("/encode", encode, ENCODE),
    ("/encode_layers", encode_layers, ENCODE_LAYERS),
    ("/tokenize", tokenize, TOKENIZE),
)


def add_routes(app: FastAPI, dependencies: Sequence[Depends]) -> None:
    """Add the routes to the app itself, in front of /docs and all others.

    FastAPI compares a request with one route after the other, which takes 1 µs each. Through `include_router` each
    request would take 100 µs longer to route.
    """
    app.router.routes[:0] = [
        DirectRoute(
            path,
            endpoint,
            methods=["POST"],
            tags=["prompts"],
            dependencies=dependencies,
            dependency_overrides_provider=app,
            **described,
        )
        for path, endpoint, described in ROUTES
    ]


def _facts(result: EncodeResult, preset: Preset, engine: Engine) -> dict[str, Any]:
    """What a reply says besides its tensors."""
    num_tokens = [len(prompt.input_ids) for prompt in result.prompts]
    return {
        "model": engine.info.model,
        "preset": preset.name,
        "num_tokens": num_tokens,
        "truncated": [prompt.truncated for prompt in result.prompts],
        "usage": {"prompt_tokens": sum(num_tokens), "layers_run": result.layers_run},
    }


def _tokenized(prompt: TokenizedPrompt, engine: Engine) -> dict[str, Any]:
    return {
        "text": prompt.text,
        "input_ids": list(prompt.input_ids),
        "tokens": engine.tokens(prompt.input_ids),
        "num_tokens": len(prompt.input_ids),
        "truncated": prompt.truncated,
    }
