"""Spans by OpenTelemetry, if its extra is installed and its own variables, OTEL_*, name where to send them.

FastAPI makes the span of a request, after the conventions for HTTP and below the span that `traceparent` names. Here
are the spans of its stages, and the pipeline that sends all of them. Its queue is bounded and drops what an exporter
that is down does not take: a request never waits for it.
"""

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from app.profile import Profile
from app.versions import version_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

NAME = "qwen3-encoder"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# Asked every few seconds, for ever: not traced, and not logged at the usual level unless they are refused.
ROUTINE = frozenset({"/livez", "/readyz", "/health", "/metrics"})
LAST_SPANS_S = 1.0  # for the last spans to be sent at the end


class RequestSpan:
    """The span that FastAPI has made of a request."""

    def __init__(self, tracing: "Tracing", span: "Span") -> None:
        self._tracing = tracing
        self._span = span

    def fail(self, code: str) -> None:
        """Note why the request is refused. Call before its response begins, which may end the span."""
        self._span.set_attribute("qwen3_encoder.code", code)

    def add_stages(self, request: Profile) -> None:
        """A span for each stage, below this one."""
        context = self._tracing.trace.set_span_in_context(self._span)
        to_epoch = time.time() - time.perf_counter()
        for stage, (began, took) in request.timed.items():
            start = began + to_epoch
            child = self._tracing.tracer.start_span(stage, context, start_time=round(start * 1e9))
            child.end(round((start + took) * 1e9))


class Tracing:
    """Makes spans, and sends them.

    Args:
        provider: of OpenTelemetry's SDK; closed with this.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace

        self.provider = provider
        self.trace = trace
        self.tracer = provider.get_tracer(NAME, version_of(NAME))

    def enter(self, request: Profile) -> RequestSpan | None:
        """The span of the request that is being served, whose ids are put into the profile; None if it has none."""
        span = self.trace.get_current_span()
        context = span.get_span_context()
        if not context.is_valid:
            return None
        request.trace_id, request.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        span.set_attribute("qwen3_encoder.request_id", request.request_id)
        return RequestSpan(self, span)

    async def close(self) -> None:
        """Send the last spans, for LAST_SPANS_S at most."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self.provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=shut_down, name="tracing", daemon=True).start()
        try:
            await asyncio.wait_for(sent.wait(), LAST_SPANS_S)
        except TimeoutError:
            logger.warning("the last spans could not be sent within %g s", LAST_SPANS_S)


def open_tracing() -> Tracing | None:
    """Tracing as the environment asks for; None if it does not. What is wrong there is logged and stops nothing."""
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_disabled or exporter == "none" or not (exporter or _first(ENDPOINTS)):
        return None
    try:
        return Tracing(_provider(exporter or "otlp"))
    except ImportError:
        logger.warning("OTEL_* ask for traces, and OpenTelemetry is not installed: pip install 'qwen3-encoder[otel]'.")
    except Exception as error:  # noqa: BLE001  # the SDK raises what it likes for a variable that it does not understand
        logger.warning("OTEL_* ask for traces, and there will be none: %s", error)
    return None


def _provider(exporter: str) -> "TracerProvider":
    """The pipeline; sampler, queue, endpoint, headers and limits are what OpenTelemetry reads from its variables."""
    protocol = _first(PROTOCOLS) or "http/protobuf"
    if (exporter, protocol) != ("otlp", "http/protobuf"):
        raise ValueError(f"expected exporter otlp with protocol http/protobuf, found {exporter} with {protocol}.")
    import fastapi.telemetry  # noqa: F401  # from FastAPI 0.165 on
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": NAME}))
    resource = Resource({"service.version": version_of(NAME) or "unknown"}).merge(resource)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _first(names: tuple[str, ...]) -> str:
    """The first of these variables that has a value."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


def telemetry(tracing: Tracing | None) -> Any:
    """What FastAPI is told; versions that know no telemetry ignore it. Its logs would hold prompts."""
    chosen = {
        "logs": False,
        "operation_spans": False,
        "auto_configure": False,
        "exclude": lambda scope: scope.get("path") in ROUTINE,
    }
    if tracing is not None:
        return chosen | {"tracer_provider": tracing.provider}
    if "opentelemetry.sdk" not in sys.modules:  # nobody can have a provider; to find that out takes 3 µs of a request
        return chosen | {"tracing": False, "metrics": False}
    return chosen
