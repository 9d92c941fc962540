"""Profiles requests under `--profile`: a log line and a Server-Timing header for each, percentiles at shutdown.

Code marks a stage with `with stage("parse"):`. Without `--profile` that does nothing.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import numpy as np
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from encoder import EncodeResult

logger = logging.getLogger(__name__)

KEPT = 10_000  # latest requests that the summary is computed from
PERCENTILES = (50, 90, 99)


class Profile:
    """One request: milliseconds of each stage, in the order in which they ended, and notes on its forward pass."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block, and add its time to the stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + (time.perf_counter() - started) * 1e3


_current: ContextVar[Profile | None] = ContextVar("profile", default=None)
_UNMEASURED = nullcontext()


def stage(name: str) -> AbstractContextManager[None]:
    """Measure the block as a stage of the current request."""
    profile = _current.get()
    return _UNMEASURED if profile is None else profile.stage(name)


def record(result: EncodeResult) -> None:
    """Add the times that the engine measured to the current request."""
    profile = _current.get()
    if profile is None:
        return
    for name, ms in (("tokenize", result.tokenization_ms), ("queue", result.queue_ms), ("model", result.inference_ms)):
        profile.stages[name] = profile.stages.get(name, 0.0) + ms
    profile.notes.append(result.cache)
    ran = result.last_pass
    if ran is not None:
        profile.notes.append(
            f"last pass: {ran.layers} layers, {ran.computed_tokens} tokens ({ran.real_tokens} real) of {ran.prompts} "
            f"prompts, forward {ran.forward_ms:.2f} + selection {ran.selection_ms:.2f} ms"
        )


class Profiler:
    """Profiles every request. It is the outermost middleware, so that the total includes the others.

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
        profile = Profile()
        _current.set(profile)
        sent_bytes = 0

        async def send_profiled(message: Message) -> None:
            nonlocal sent_bytes
            if message["type"] == "http.response.start" and profile.stages:
                MutableHeaders(scope=message)["server-timing"] = server_timing(profile.stages)
            sent_bytes += len(message.get("body", b""))
            with stage("send"):
                await send(message)

        started = time.perf_counter()
        await self.app(scope, receive, send_profiled)
        total_ms = (time.perf_counter() - started) * 1e3
        if len(profile.stages) > 1:  # every response has `send`; routes with stages of their own have more
            profile.stages["other"] = total_ms - sum(profile.stages.values())
            self.kept.append(profile.stages | {"total": total_ms})
            notes = [f"{total_ms:.2f} ms", f"{sent_bytes:,} bytes", *profile.notes, f"request={scope['request_id']}"]
            logger.info("%s %s: %s = %s", scope["method"], scope["path"], in_words(profile.stages), "; ".join(notes))

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
