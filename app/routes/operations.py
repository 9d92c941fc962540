"""The routes for those who run the service or want to know what it serves."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from app.routes.openapi import errors
from app.service import catalog_of, engine_of, metrics_of, settings_of
from encoder import InvalidField, ModelInfo, Preset, check_preset

router = APIRouter(tags=["operations"])

VERSIONED = ("fastapi", "uvicorn", "pydantic", "msgpack")


@router.get("/livez", responses=errors(500))
async def livez() -> dict[str, str]:
    """The process answers. True from the first second, however busy the device is."""
    return {"status": "alive"}


@router.get("/readyz", responses=errors(500, 503))
async def readyz(request: Request) -> dict[str, str]:
    """The next request can be expected to succeed: loaded, warm, not stalled, not draining."""
    await engine_of(request).probe()
    return {"status": "ready"}


@router.get("/health", responses=errors(401, 500, 503))
async def health(request: Request) -> dict[str, str]:
    """The same as `/readyz`, for clients that look here."""
    return await readyz(request)


@router.get("/presets", responses=errors(401, 500, 503))
async def presets(request: Request) -> dict[str, Any]:
    """All presets, and for each whether it fits the loaded checkpoint."""
    engine, catalog = engine_of(request), catalog_of(request)
    return {
        "default_preset": catalog.default,
        "presets": [asdict(preset) | fit(preset, engine.info) for preset in catalog],
    }


def fit(preset: Preset, info: ModelInfo) -> dict[str, Any]:
    """Whether a preset fits the loaded checkpoint, and why not."""
    try:
        check_preset(preset, int(info.dims["num_hidden_layers"]), int(info.dims["hidden_size"]), info.num_layers)
    except InvalidField as error:
        return {"fits": False, "reason": str(error)}
    return {"fits": True, "reason": None}


@router.get("/info", responses=errors(401, 500, 503))
async def info(request: Request) -> dict[str, Any]:
    """What is served, how it computes, and the limits of a request."""
    engine, settings = engine_of(request), settings_of(request)
    loaded = asdict(engine.info)
    return loaded | {
        "versions": loaded["versions"] | {name: version(name) for name in VERSIONED},
        "default_preset": settings.catalog.default,
        "limits": asdict(engine.limits)
        | {"max_body_bytes": settings.max_body_bytes, "max_json_floats": settings.max_json_floats},
    }


@router.get("/metrics", response_class=PlainTextResponse, responses=errors(401, 500))
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    metrics = metrics_of(request)
    return Response(metrics.render(), media_type=metrics.media_type)
