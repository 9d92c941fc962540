"""What a route needs, typed, in one place.

`create_app` makes one `Service` and puts it on `app.state`. Routes receive it as a FastAPI dependency:

    @router.get("/info")
    async def info(service: ServiceDep) -> dict[str, Any]: ...

`app.dependency_overrides[get_service]` replaces it for every route.
"""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, FastAPI, Request

from app.access.keys import Keys
from app.admission import Admission
from app.http.traffic import Traffic
from app.lifecycle import Lifecycle
from app.metrics import Metrics
from app.settings import Settings
from app.tracing import Tracing
from encoder import Catalog, Engine


@dataclass(frozen=True, slots=True)
class Service:
    """The parts of a running service.

    Attributes:
        settings: what the app was created with.
        engine: encodes prompts; its model may still be loading.
        metrics: what Prometheus scrapes.
        traffic: what all connections share: their limits, and the bytes that they hold.
        lifecycle: loads the engine's model, and closes the engine.
        keys: that open the service; None if it asks for none.
        tracing: makes spans; None without.
        admission: lets requests in.
    """

    settings: Settings
    engine: Engine
    metrics: Metrics
    traffic: Traffic
    lifecycle: Lifecycle
    keys: Keys | None
    tracing: Tracing | None = None
    admission: Admission = field(default_factory=Admission)

    @property
    def catalog(self) -> Catalog:
        """The presets that requests may name."""
        return self.settings.catalog


def service_of(app: FastAPI) -> Service:
    """The service that `create_app` gave this app."""
    service: Service = app.state.service
    return service


async def get_service(request: Request) -> Service:
    """The service as a dependency. Async: FastAPI runs a plain function on another thread, which takes 200 µs."""
    return service_of(request.app)


ServiceDep = Annotated[Service, Depends(get_service)]
