"""Builds the app: a plain FastAPI app with our routes, middleware and exception handlers."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from app import errors
from app.access.host import HostCheck
from app.access.keys import KeyCheck, Keys
from app.access.origin import OriginCheck
from app.exposition import Exposition
from app.http.traffic import Traffic
from app.lifecycle import Lifecycle
from app.metrics import Metrics
from app.middleware import Head
from app.profiler import Profiler
from app.request_context import RequestContext
from app.routes import described, dropins, operations, prompts
from app.service import Service, service_of
from app.settings import Settings
from app.tracing import open_tracing, telemetry
from encoder import Engine

BEARER = HTTPBearer(description="The setting `api_key` of the service.", auto_error=False)
# What a page of an allowed origin may send, and read beside the body.
CORS: dict[str, Any] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("*",),
    "expose_headers": ("*",),
    "max_age": 3600,
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings; without any, for those of the environment.

    `app.add_middleware`, `app.add_exception_handler`, `app.dependency_overrides` and `app.mount` work as FastAPI
    documents them, for every route.

    Errors: SettingsError if the key file cannot be used.
    """
    settings = settings or Settings()
    engine = Engine(
        settings.model_options(),
        limits=settings.limits(),
        cache_bytes=settings.cache_bytes,
        disk_cache_dir=settings.disk_cache_dir,
        disk_cache_bytes=settings.disk_cache_bytes,
        stall_s=settings.stall_s,
        measure_passes=settings.profile,
    )
    tracing = open_tracing()
    app = FastAPI(
        title="Qwen3 text encoder",
        description="Prompts in, the hidden states that diffusion models are conditioned on out.",
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers=errors.HANDLERS,
        telemetry=telemetry(tracing),
    )
    keys, traffic = Keys.of(settings), Traffic(settings)
    app.state.service = service = Service(settings, engine, Metrics(), traffic, Lifecycle(engine), keys, tracing)
    service.metrics.register(Exposition(engine, service.metrics, service.admission, traffic))
    add_routes(app)
    add_middleware(app)
    app.openapi = functools.partial(described.describe, app)  # type: ignore[method-assign]
    described.describe_off_loop(app)
    return app


def add_routes(app: FastAPI) -> None:
    """All routes. Where an API key is set, the API description says which routes ask for it; KeyCheck checks it."""
    key_needed = service_of(app).keys is not None
    dependencies = [Security(BEARER)] if key_needed else []
    prompts.add_routes(app, dependencies)
    for router in (dropins.router, operations.router):
        app.include_router(router, dependencies=dependencies)
    app.include_router(operations.probes)


def add_middleware(app: FastAPI) -> None:
    """What surrounds every route, from the inside out."""
    service = service_of(app)
    settings, keys = service.settings, service.keys
    app.add_middleware(Head)
    if keys is not None:
        app.add_middleware(KeyCheck, keys=keys)
    if settings.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.allowed_origins, **CORS)
    if "*" not in settings.allowed_origins:
        app.add_middleware(OriginCheck, origins=settings.allowed_origins)
    if names := host_names(settings):
        app.add_middleware(HostCheck, names=names)
    app.add_middleware(
        RequestContext,
        observe=service.metrics.observe_request,
        admission=service.admission,
        tracing=service.tracing,
    )
    if settings.profile:
        app.add_middleware(Profiler)


def host_names(settings: Settings) -> frozenset[str]:
    """The names that the Host header may contain beside addresses; empty allows any."""
    if "*" in settings.allowed_hosts:
        return frozenset()
    if settings.uds is not None and not settings.allowed_hosts:  # a browser cannot reach a Unix socket
        return frozenset()
    return frozenset({"localhost", settings.host.lower(), *settings.allowed_hosts})


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model while the service already answers, and close the engine at the end."""
    service = service_of(app)
    sweeper = asyncio.create_task(service.traffic.run())
    service.lifecycle.start()
    try:
        yield
    finally:
        await service.lifecycle.stop()
        sweeper.cancel()
        if service.tracing is not None:
            await service.tracing.close()
