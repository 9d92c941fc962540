"""What surrounds every route, in plain ASGI. `create_app` adds these by `app.add_middleware`, from the inside out.

A request passes Profiler → RequestContext → HostCheck → OriginCheck → CORSMiddleware → KeyCheck → Head → FastAPI's
routes. HostCheck, OriginCheck and KeyCheck are in app/access/. Profiler, CORSMiddleware and KeyCheck are there only if
the settings ask for them, the two other checks unless the settings switch them off. CORS comes before the key, because
a browser asks for permission without one.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/livez", "/readyz"})  # an orchestrator asks these without a key


def header(scope: Scope, name: bytes) -> str:
    """The first header of this name, which is in lower case; empty if there is none.

    Starlette's Headers would copy all of them to find one.
    """
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""


class Head:
    """Answers HEAD as GET. The server leaves the body out, because its own scope still says HEAD."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, HEAD as GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        inner: Scope = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send)
        finally:
            scope["route"] = inner.get("route")  # RequestContext counts by it
