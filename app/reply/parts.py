"""A response whose body is several buffers, none of which is copied on its way to the server."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.wire import Parts

JOIN_BELOW = 64 * 1024  # bytes; the copy costs less than a message of its own


class PartsResponse(Response):
    """Sends each large part as a message of its own, and the small ones between them joined."""

    def __init__(self, parts: Parts, headers: Mapping[str, str], media_type: str) -> None:
        length = sum(len(part) for part in parts)
        super().__init__(headers={**headers, "content-length": str(length)}, media_type=media_type)
        self.messages = list(joined(parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application that this response is."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for number, body in enumerate(self.messages, 1):
            await send({"type": "http.response.body", "body": body, "more_body": number < len(self.messages)})


def joined(parts: Parts) -> Iterator[bytes | memoryview]:
    """The same bytes in fewer pieces: neighbours below JOIN_BELOW become one."""
    for large, group in groupby(parts, lambda part: len(part) >= JOIN_BELOW):
        neighbours = list(group)
        yield from neighbours if large else [b"".join(neighbours)]
