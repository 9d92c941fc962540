"""What routes ask for by type: the engine, the settings, the presets, the metrics, and the parsed body.

Each reads the app's state itself: every dependency costs a request 50 µs in FastAPI, those of dependencies too. All are
coroutines although few wait: FastAPI sends a plain function to another thread, for 200 µs.
"""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request
from pydantic import BaseModel

from app.body import read_document
from app.metrics import Metrics
from app.profile import stage
from app.settings import Settings
from encoder import Catalog, Engine

Body = TypeVar("Body", bound=BaseModel)


async def get_settings(request: Request) -> Settings:
    """The settings that the app was created with."""
    return cast(Settings, request.app.state.settings)


async def get_catalog(request: Request) -> Catalog:
    """The presets of the app."""
    return (await get_settings(request)).catalog


async def get_engine(request: Request) -> Engine:
    """The engine of the app, loaded or not."""
    return cast(Engine, request.app.state.engine)


async def get_metrics(request: Request) -> Metrics:
    """The metrics of the app."""
    return cast(Metrics, request.app.state.metrics)


SettingsDep = Annotated[Settings, Depends(get_settings)]
CatalogDep = Annotated[Catalog, Depends(get_catalog)]
EngineDep = Annotated[Engine, Depends(get_engine)]
MetricsDep = Annotated[Metrics, Depends(get_metrics)]


def body_of(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that reads the body, JSON or msgpack, as `model`."""

    async def read_body(request: Request) -> Body:
        settings = await get_settings(request)
        document = await read_document(request, settings.max_body_bytes, settings.body_timeout_s)
        with stage("parse"):
            return model.model_validate(document)

    return read_body
