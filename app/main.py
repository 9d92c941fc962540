"""Builds the app: the engine, the routes, and what surrounds every request."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from app import errors
from app.metrics import Metrics
from app.middleware import Head, HostCheck, KeyCheck, RequestContext
from app.profile import Profiler
from app.routes import dropins, operations
from app.routes import prompts as routes
from app.routes.prompt_routes import PromptRoutes
from app.settings import Settings, is_loopback
from encoder import EncoderError, Engine

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class App(FastAPI):
    """FastAPI, and what a request meets before it.

    Attributes:
        front: what it meets first.
    """

    front: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        scope["app"] = self
        await self.front(scope, receive, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service for these settings; those of the environment where none are given."""
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
    app = App(
        title="Qwen3 text encoder",
        description="Prompts in, the hidden states that diffusion models are conditioned on out.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings, app.state.engine, app.state.metrics = settings, engine, Metrics(engine)
    app.state.closed = None
    for router in (routes.router, dropins.router, operations.router):
        app.include_router(router)
    errors.install(app)
    app.front = _front(app, settings)
    return app


def _front(app: App, settings: Settings) -> ASGIApp:
    """The middleware, and the short way for prompts."""
    front: ASGIApp = PromptRoutes(partial(FastAPI.__call__, app), routes.router)
    front = KeyCheck(Head(front), settings.api_key.get_secret_value() if settings.api_key else None)
    front = RequestContext(HostCheck(front, allowed_hosts(settings)), app.state.metrics.observe_request)
    return Profiler(front) if settings.profile else front


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Names that the Host header may have; empty allows any."""
    if "*" in settings.allowed_hosts or settings.uds is not None:  # no browser reaches a unix socket
        return frozenset()
    if not settings.allowed_hosts and not is_loopback(settings.host):
        return frozenset()
    return LOOPBACK | {settings.host.lower()} | {name.lower() for name in settings.allowed_hosts}


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model behind a service that already answers, and close the engine at the end."""
    engine: Engine = app.state.engine
    app.state.loading = loading = asyncio.create_task(_load(engine))
    try:
        yield
    finally:
        loading.cancel()
        await asyncio.wait([loading])
        await close(app)


async def close(app: FastAPI) -> None:
    """Close the engine, once. What it has not answered fails with NotReady.

    `app.state.closed` is then True, or False where a load or a forward pass still holds the model's thread.
    """
    if app.state.closed is not None:
        return
    app.state.closed = False
    timeout_s = app.state.settings.drain_timeout_s
    try:
        await asyncio.wait_for(app.state.engine.close(), timeout_s)
        app.state.closed = True
    except TimeoutError:
        logger.warning("the model's thread has not ended within %g s", timeout_s)


async def _load(engine: Engine) -> bool:
    """Whether the model is loaded; the log says why not."""
    try:
        await engine.start()
    except EncoderError as error:
        logger.error("cannot serve: %s", error)
        return False
    except Exception:  # a bug, or whatever MLX raises: the process ends all the same, with its traceback in the log
        logger.exception("cannot serve: loading failed")
        return False
    return True
