"""The pages that may use the service in a browser: those of its own origin, and of the origins that the settings name.

The rule for requests that do something is that of Go's `net/http.CrossOriginProtection`. Browsers say in Sec-Fetch-Site
how the page and the service are related, and no page can forge it; over plain HTTP to another machine they say only the
Origin. Programs send neither, and pass.
"""

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import OriginNotAllowed
from app.middleware import header

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  # a link may lead here; CORS keeps the reply from other pages

MARKS = frozenset({b"origin", b"sec-fetch-site"})


class OriginCheck:
    """Refuses a POST from the page of another origin, so that no page a user visits computes or probes the cache here.

    A page cannot post JSON without asking first, and is told no. This holds also where a browser does not ask.

    Args:
        origins: those that may, as a browser writes them.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self.app = app
        self.origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. Errors: OriginNotAllowed."""
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS and self._is_foreign(scope):
            raise OriginNotAllowed(
                f"origin: {header(scope, b'origin')[:100]!a} is the origin of another site's page.",
                "If it may use the service, start it with --allowed-origins ORIGIN, or QWEN3_ENCODER_ALLOWED_ORIGINS.",
            )
        await self.app(scope, receive, send)

    def _is_foreign(self, scope: Scope) -> bool:
        marks = {name: str(value, "latin-1") for name, value in scope["headers"] if name in MARKS}
        if not marks:  # a program
            return False
        origin = marks.get(b"origin", "")
        if origin in self.origins:
            return False
        if site := marks.get(b"sec-fetch-site"):
            return site not in ("same-origin", "none")  # none: the user's own doing, or an extension of the browser
        return origin != "" and origin.partition("://")[2].lower() != header(scope, b"host").lower()
