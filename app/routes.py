"""The routes that work on prompts. Each reads as the path of a request: body, preset, engine, reply."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from app import wire
from app.dependencies import EngineDep, MetricsDep, SettingsDep, body_of
from app.disconnect import unless_disconnected
from app.formats import ReplyFormatDep
from app.metrics import Metrics
from app.negotiation import negotiate
from app.openapi import ENCODE, ENCODE_LAYERS, TOKENIZE
from app.schemas import EncodeLayersRequest, EncodeRequest, TokenizeRequest
from app.settings import Settings
from encoder import EncodeResult, Engine, Preset, TokenizedPrompt

router = APIRouter(tags=["prompts"])


@router.post("/encode", **ENCODE)
async def encode(
    request: Request,
    reply_format: ReplyFormatDep,
    body: Annotated[EncodeRequest, Depends(body_of(EncodeRequest))],
    engine: EngineDep,
    settings: SettingsDep,
    metrics: MetricsDep,
) -> Response:
    """Encode prompts to the hidden states of a preset.

    Without a preset: the last hidden state, after the final norm, of the bare prompt.
    """
    preset = body.resolve(settings.default_preset)
    result = await _run(request, body, preset, engine, settings, metrics)
    response = await reply_format.respond(_facts(result, preset, engine), result.embeds, settings.max_json_floats)
    response.headers.update(_timings(result))
    return response


@router.post("/encode_layers", **ENCODE_LAYERS)
async def encode_layers(
    request: Request,
    reply_format: ReplyFormatDep,
    body: Annotated[EncodeLayersRequest, Depends(body_of(EncodeLayersRequest))],
    engine: EngineDep,
    settings: SettingsDep,
    metrics: MetricsDep,
) -> Response:
    """Encode prompts to the hidden states of chosen layers; everything else is as in `/encode`."""
    return await encode(request, reply_format, body, engine, settings, metrics)


@router.post("/tokenize", **TOKENIZE)
async def tokenize(
    request: Request,
    body: Annotated[TokenizeRequest, Depends(body_of(TokenizeRequest))],
    engine: EngineDep,
    settings: SettingsDep,
) -> Response:
    """Show what would be encoded: the formatted prompt and its tokens. Does not run the model."""
    media_type = negotiate(request, (wire.JSON, wire.MSGPACK, wire.X_MSGPACK))
    preset = body.resolve(settings.default_preset)
    prompts = await unless_disconnected(request, engine.tokenize(body.texts(), preset))
    document = {
        "model": engine.info.model,
        "preset": preset.name,
        "prompts": [_tokenized(prompt, engine) for prompt in prompts],
    }
    return Response(wire.dump_json(document) if media_type == wire.JSON else wire.pack(document), media_type=media_type)


async def _run(
    request: Request, body: EncodeRequest, preset: Preset, engine: Engine, settings: Settings, metrics: Metrics
) -> EncodeResult:
    """The engine's result, counted in the metrics."""
    use_cache = not {"no-cache", "no-store"} & _directives(request)
    work = engine.encode(body.texts(), preset, body.dtype, settings.request_timeout_s, use_cache)
    result = await unless_disconnected(request, work)
    metrics.observe_result(result)
    return result


def _directives(request: Request) -> set[str]:
    return {name.strip().lower() for name in request.headers.get("cache-control", "").split(",")}


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


def _timings(result: EncodeResult) -> dict[str, str]:
    """Response headers, in milliseconds."""
    return {
        "x-tokenization-time": f"{result.tokenization_ms:.2f}",
        "x-queue-time": f"{result.queue_ms:.2f}",
        "x-inference-time": f"{result.inference_ms:.2f}",
        "x-cache": result.cache,
    }


def _tokenized(prompt: TokenizedPrompt, engine: Engine) -> dict[str, Any]:
    return {
        "text": prompt.text,
        "input_ids": list(prompt.input_ids),
        "tokens": engine.tokens(prompt.input_ids),
        "num_tokens": len(prompt.input_ids),
        "truncated": prompt.truncated,
    }
