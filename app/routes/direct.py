"""A short path to routes that read the request and build the response themselves.

FastAPI's own handler reads a body, solves dependencies and serializes a result. The prompt routes do all of that in
their own way (bodies in msgpack, time limits, replies in several formats), so its work is spent for nothing. Figures:
docs/decisions/0007-what-the-service-adds.md.
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from app.service import get_service

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class DirectRoute(APIRoute):
    """Calls an endpoint `(request, service) -> Response` without FastAPI's dependency solver.

    Middleware, exception handlers, routing and the API description are FastAPI's, as for any other route. Dependencies
    other than the service are described but not run: KeyCheck has already checked the API key. When the app has
    dependency overrides, FastAPI's own handler runs the route, with all of its dependencies.
    """

    def get_route_handler(self) -> Handler:
        """The handler that FastAPI calls for each request to this route."""
        fastapi_handler, endpoint = super().get_route_handler(), self.endpoint

        async def handle(request: Request) -> Response:
            if request.app.dependency_overrides:
                return await fastapi_handler(request)
            response: Response = await endpoint(request, await get_service(request))
            return response

        return handle
