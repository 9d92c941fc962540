"""The routes for whoever runs the service or wants to know what it serves."""

from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from app.request.query import QueryRoute
from app.routes.openapi import errors
from app.service import ServiceDep
from encoder import Engine, InvalidField, Preset

probes = APIRouter(tags=["operations"], route_class=QueryRoute)  # these two never ask for the API key
router = APIRouter(tags=["operations"], route_class=QueryRoute)

VERSIONED = ("fastapi", "uvicorn", "pydantic", "msgpack")


@probes.get("/livez", responses=errors())
async def livez() -> dict[str, str]:
    """The process answers, from the first second on and however busy the device is."""
    return {"status": "alive"}


@probes.get("/readyz", responses=errors())
async def readyz(service: ServiceDep) -> dict[str, str]:
    """The next request can be expected to succeed: the engine's state is `ready`, and it is not draining."""
    service.admission.check()
    service.engine.check_ready()
    return {"status": "ready"}


@router.get("/health", responses=errors(401))
async def health(service: ServiceDep) -> dict[str, str]:
    """The same as `/readyz`, for clients that ask here."""
    return await readyz(service)


@router.get("/presets", responses=errors(401))
async def presets(service: ServiceDep) -> dict[str, Any]:
    """All presets, and for each whether it fits the loaded checkpoint."""
    engine, catalog = service.engine, service.catalog
    return {
        "default_preset": catalog.default,
        "presets": [asdict(preset) | fit(preset, engine) for preset in catalog],
    }


def fit(preset: Preset, engine: Engine) -> dict[str, Any]:
    """Whether a preset fits the loaded checkpoint, and why not."""
    try:
        engine.check(preset)
    except InvalidField as error:
        return {"fits": False, "reason": str(error)}
    return {"fits": True, "reason": None}


@router.get("/info", responses=errors(401))
async def info(service: ServiceDep) -> dict[str, Any]:
    """The model that is served, how it is computed, and the limits of a request."""
    engine, settings = service.engine, service.settings
    loaded = asdict(engine.info)
    return loaded | {
        "versions": loaded["versions"] | _versions(),
        "default_preset": settings.catalog.default,
        "limits": asdict(engine.limits)
        | {"max_body_bytes": settings.max_body_bytes, "max_json_floats": settings.max_json_floats},
    }


@cache  # it reads files
def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONED}


@router.get("/metrics", response_class=PlainTextResponse, responses=errors(401))
async def metrics(service: ServiceDep) -> Response:
    """Prometheus metrics."""
    return Response(await service.metrics.render(), media_type=service.metrics.media_type)
