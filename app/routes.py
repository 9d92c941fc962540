"""The routes that work on prompts. Each reads as the path of a request: body, preset, engine, reply."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from app import wire
from app.dependencies import CatalogDep, EngineDep, body_of
from app.disconnect import unless_disconnected
from app.encoding import EncodingDep, timings
from app.formats import ReplyFormatDep
from app.negotiation import negotiate
from app.openapi import ENCODE, ENCODE_LAYERS, TOKENIZE
from app.schemas import EncodeLayersRequest, EncodeRequest, TokenizeRequest
from encoder import EncodeResult, Engine, Preset, TokenizedPrompt

router = APIRouter(tags=["prompts"])


@router.post("/encode", **ENCODE)
async def encode(
    reply_format: ReplyFormatDep,
    body: Annotated[EncodeRequest, Depends(body_of(EncodeRequest))],
    catalog: CatalogDep,
    engine: EngineDep,
    encoding: EncodingDep,
) -> Response:
    """Encode prompts to the hidden states of a preset.

    Without a preset: the last hidden state, after the final norm, of the bare prompt.
    """
    preset = body.resolve(catalog)
    result = await encoding.encode(body.texts(), preset, body.dtype)
    response = await reply_format.respond(result.embeds, _facts(result, preset, engine))
    response.headers.update(timings(result))
    return response


@router.post("/encode_layers", **ENCODE_LAYERS)
async def encode_layers(
    reply_format: ReplyFormatDep,
    body: Annotated[EncodeLayersRequest, Depends(body_of(EncodeLayersRequest))],
    catalog: CatalogDep,
    engine: EngineDep,
    encoding: EncodingDep,
) -> Response:
    """Encode prompts to the hidden states of chosen layers; everything else is as in `/encode`."""
    return await encode(reply_format, body, catalog, engine, encoding)


@router.post("/tokenize", **TOKENIZE)
async def tokenize(
    request: Request,
    body: Annotated[TokenizeRequest, Depends(body_of(TokenizeRequest))],
    catalog: CatalogDep,
    engine: EngineDep,
) -> Response:
    """Show what would be encoded: the formatted prompt and its tokens. Does not run the model."""
    media_type = negotiate(request, (wire.JSON, wire.MSGPACK, wire.X_MSGPACK))
    preset = body.resolve(catalog)
    prompts = await unless_disconnected(request, engine.tokenize(body.texts(), preset))
    document = {
        "model": engine.info.model,
        "preset": preset.name,
        "prompts": [_tokenized(prompt, engine) for prompt in prompts],
    }
    return Response(wire.dump_json(document) if media_type == wire.JSON else wire.pack(document), media_type=media_type)


def _facts(result: EncodeResult, preset: Preset, engine: Engine) -> dict[str, Any]:
    """What a reply says beside its tensors."""
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
