"""The query of a request's target: bounded, and each parameter once."""

from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from app.errors import TargetTooLong
from encoder import InvalidField

MAX_BYTES = 2000  # thousands of parameters would be parsed on the event loop


def read_query(request: Request, names: Collection[str]) -> Mapping[str, str]:
    """The parameters. Those that no route knows are ignored.

    Args:
        names: parameters that the route knows.
    Errors: TargetTooLong, InvalidField where one of `names` comes twice: nobody can tell which was meant.
    """
    query = request.scope["query_string"]
    if not query:  # parsing an empty one takes as long
        return {}
    if len(query) > MAX_BYTES:
        raise TargetTooLong(f"The query may have {MAX_BYTES:,} bytes, it has {len(query):,}.", "Use the body.")
    parameters = request.query_params
    for name in names:
        if len(parameters.getlist(name)) > 1:
            raise InvalidField(name, "comes twice in the query, expected once.")
    return parameters


class QueryRoute(APIRoute):
    """A route whose query FastAPI reads, checked before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler that FastAPI calls for each request to this route."""
        handler, names = super().get_route_handler(), [field.alias for field in self.dependant.query_params]

        async def handle(request: Request) -> Response:
            read_query(request, names)
            return await handler(request)

        return handle
