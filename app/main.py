"""Builds the app: a plain FastAPI app with our routes, middleware and exception handlers."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer

from app import errors
from app.lifecycle import Lifecycle
from app.metrics import Metrics
from app.middleware import Head, HostCheck, KeyCheck, RequestContext
from app.profile import Profiler
from app.routes import dropins, operations, prompts
from app.service import Service, service_of
from app.settings import Settings, is_loopback
from encoder import Engine

BEARER = HTTPBearer(description="The setting `api_key` of the service.", auto_error=False)
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings; without any, for those of the environment.

    `app.add_middleware`, `app.add_exception_handler`, `app.dependency_overrides` and `app.mount` work as FastAPI
    documents them, for every route.
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
    app = FastAPI(
        title="Qwen3 text encoder",
        description="Prompts in, the hidden states that diffusion models are conditioned on out.",
        lifespan=lifespan,
        redirect_slashes=False,
        exception_handlers=errors.HANDLERS,
    )
    app.state.service = Service(settings, engine, Metrics(engine), Lifecycle(engine, settings.drain_timeout_s))
    add_routes(app)
    add_middleware(app)
    return app


def add_routes(app: FastAPI) -> None:
    """All routes. Where an API key is set, the API description says which routes ask for it; KeyCheck checks it."""
    key_needed = service_of(app).settings.api_key is not None
    dependencies = [Security(BEARER)] if key_needed else []
    prompts.add_routes(app, dependencies)
    for router in (dropins.router, operations.router):
        app.include_router(router, dependencies=dependencies)
    app.include_router(operations.probes)


def add_middleware(app: FastAPI) -> None:
    """What surrounds every route, from the inside out."""
    settings, metrics = service_of(app).settings, service_of(app).metrics
    app.add_middleware(Head)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, api_key=settings.api_key.get_secret_value())
    if hosts := allowed_hosts(settings):
        app.add_middleware(HostCheck, allowed=hosts)
    app.add_middleware(RequestContext, observe=metrics.observe_request)
    if settings.profile:
        app.add_middleware(Profiler)


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Host names that the Host header may contain; empty allows any."""
    if "*" in settings.allowed_hosts or settings.uds is not None:  # a browser cannot reach a Unix socket
        return frozenset()
    if not settings.allowed_hosts and not is_loopback(settings.host):
        return frozenset()
    return LOOPBACK | {settings.host.lower()} | {name.lower() for name in settings.allowed_hosts}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model while the service already answers, and close the engine at the end."""
    lifecycle = service_of(app).lifecycle
    lifecycle.start()
    try:
        yield
    finally:
        await lifecycle.stop()
