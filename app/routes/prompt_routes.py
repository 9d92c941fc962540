"""The short way to a route that works on prompts.

FastAPI describes these routes, and answers whatever is not their business: another method, a path that is nearly
theirs. A request that is theirs meets none of the layers that FastAPI and Starlette put around a route, which have
nothing to do for it: docs/decisions/0007-what-the-service-adds.md.
"""

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import answer_error


class PromptRoutes:
    """Answers a router's requests; all others are the app's.

    Args:
        app: FastAPI.
        router: its routes take the request and give the response, and have no parameters in their paths.
    """

    def __init__(self, app: ASGIApp, router: APIRouter) -> None:
        self.app = app
        routes = [route for route in router.routes if isinstance(route, APIRoute)]
        self.routes = {(method, route.path): route for route in routes for method in route.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        scope["route"] = route  # as Starlette's router does
        request = Request(scope, receive)
        try:
            response = await route.endpoint(request)
        except Exception as error:  # what the table of errors does not know goes on to RequestContext
            response = await answer_error(request, error)
        await response(scope, receive, send)
