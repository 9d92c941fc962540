"""Says where the time of requests went, under `--profile`: in the log, and in a Server-Timing header."""

import logging
import time
from collections import deque
from collections.abc import Mapping

import numpy as np
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.profile import Profile

logger = logging.getLogger(__name__)

KEPT = 10_000  # latest requests that the summary is computed from
PERCENTILES = (50, 90, 99)


class Profiler:
    """Logs every request's profile. It is the outermost middleware, so that the total includes the others.

    Time outside all stages is `other`: middleware, routing, validation, and switching between threads.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.kept: deque[Mapping[str, float]] = deque(maxlen=KEPT)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Profile one request, or log the summary when the app's lifespan ends."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            self._log_summary()
            return
        sent_bytes = 0

        async def send_profiled(message: Message) -> None:
            nonlocal sent_bytes
            if message["type"] == "http.response.start" and (stages := scope["profile"].stages):
                MutableHeaders(scope=message)["server-timing"] = server_timing(stages)
            sent_bytes += len(message.get("body", b""))
            await send(message)

        started = time.perf_counter()
        await self.app(scope, receive, send_profiled)
        self._log(scope, (time.perf_counter() - started) * 1e3, sent_bytes)

    def _log(self, scope: Scope, total_ms: float, sent_bytes: int) -> None:
        profile: Profile = scope["profile"]
        stages = profile.stages
        if len(stages) > 1:  # every response has `send`; routes with stages of their own have more
            stages["other"] = total_ms - sum(stages.values())
            self.kept.append(stages | {"total": total_ms})
            notes = [f"{total_ms:.2f} ms", f"{sent_bytes:,} bytes", *profile.notes, f"request={profile.request_id}"]
            logger.info("%s %s: %s = %s", scope["method"], scope["path"], in_words(stages), "; ".join(notes))

    def _log_summary(self) -> None:
        if self.kept:
            logger.info("percentiles of the last %d requests, ms:\n%s", len(self.kept), table(self.kept))


def server_timing(stages: Mapping[str, float]) -> str:
    """The header that browsers show as a chart. Source: https://www.w3.org/TR/server-timing/."""
    return ", ".join(f"{name};dur={ms:.2f}" for name, ms in stages.items())


def in_words(stages: Mapping[str, float]) -> str:
    """The stages as a sum."""
    return " + ".join(f"{name} {ms:.2f}" for name, ms in stages.items())


def table(requests: deque[Mapping[str, float]]) -> str:
    """A row for each stage; a request without that stage counts as 0."""
    names = [*dict.fromkeys(name for stages in requests for name in stages if name != "total"), "total"]
    lines = ["stage     " + "".join(f"{f'p{p}':>10}" for p in PERCENTILES)]
    for name in names:
        values = np.percentile([stages.get(name, 0.0) for stages in requests], PERCENTILES)
        lines.append(f"{name:10}" + "".join(f"{value:10.2f}" for value in values))
    return "\n".join(lines)
