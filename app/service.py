"""What the app holds, as a request finds it there.

Plain calls and no FastAPI dependencies: each of those costs a request 50 µs, as does a query parameter.
"""

from typing import cast

from starlette.requests import Request

from app.metrics import Metrics
from app.settings import Settings
from encoder import Catalog, Engine


def settings_of(request: Request) -> Settings:
    """The settings that the app was created with."""
    return cast(Settings, request.app.state.settings)


def catalog_of(request: Request) -> Catalog:
    """The presets of the app."""
    return settings_of(request).catalog


def engine_of(request: Request) -> Engine:
    """The engine of the app, loaded or not."""
    return cast(Engine, request.app.state.engine)


def metrics_of(request: Request) -> Metrics:
    """The metrics of the app."""
    return cast(Metrics, request.app.state.metrics)
