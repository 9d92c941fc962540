"""The step that every route which answers with hidden states shares: from prompts to the engine's result."""

from collections.abc import Sequence

from starlette.requests import Request

from app import profile
from app.http.budget import hold_of
from app.request.deadline import deadline_of
from app.request.disconnect import unless_disconnected
from app.service import Service
from encoder import CachePolicy, DType, EncodeResult, Preset

CACHE_ORDER = ("hit", "coalesced", "miss")  # of several results, the last in this order becomes the header x-cache


async def encode_prompts(
    request: Request, service: Service, prompts: Sequence[str], preset: Preset, dtype: DType
) -> EncodeResult:
    """The hidden states, recorded in the metrics. The work stops when its time is up or its client disconnects.

    Call after the body has been read. Several calls for a request share its deadline. The bytes of the results are held
    until the reply has left; twice those of several prompts, which the reply copies.

    Errors: those of Engine.encode, ClientDisconnected, TooManyBytes.
    """
    hold, copies = hold_of(request.scope), 1 if len(prompts) == 1 else 2
    work = service.engine.encode(
        prompts, preset, dtype, deadline_of(request), _cache_policy(request), lambda size: hold.take(copies * size)
    )
    result = await unless_disconnected(request, work)
    service.metrics.observe_result(result)
    profile.record(result)
    return result


def _cache_policy(request: Request) -> CachePolicy:
    """How the request's Cache-Control header lets the cache be used.

    Source: RFC 9111, 5.2.1: `no-cache` asks for a new result, which may be kept; `no-store` asks to keep nothing.
    """
    fields = ",".join(request.headers.getlist("cache-control"))
    directives = {directive.strip().lower() for directive in fields.split(",")}
    if "no-store" in directives:
        return "bypass"
    return "refresh" if "no-cache" in directives else "use"


def timings(*results: EncodeResult) -> dict[str, str]:
    """Response headers for results computed one after the other; times in milliseconds."""
    return {
        "x-tokenization-time": f"{sum([result.tokenization_ms for result in results]):.2f}",
        "x-queue-time": f"{sum([result.queue_ms for result in results]):.2f}",
        "x-inference-time": f"{sum([result.inference_ms for result in results]):.2f}",
        "x-cache": max([result.cache for result in results], key=CACHE_ORDER.index),
    }
