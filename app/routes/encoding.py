"""The engine as one request sees it: what every route that answers with hidden states shares."""

from collections.abc import Sequence

from starlette.requests import Request

from app import profile
from app.request.disconnect import unless_disconnected
from app.service import engine_of, metrics_of, settings_of
from encoder import CachePolicy, DType, EncodeResult, Preset


async def encode_prompts(request: Request, prompts: Sequence[str], preset: Preset, dtype: DType) -> EncodeResult:
    """The hidden states, within the request's time, for as long as its client stays, and counted in the metrics.

    Errors: those of Engine.encode, ClientDisconnected.
    """
    timeout_s = settings_of(request).request_timeout_s
    work = engine_of(request).encode(prompts, preset, dtype, timeout_s, _cache_policy(request))
    result = await unless_disconnected(request, work)
    metrics_of(request).observe_result(result)
    profile.record(result)
    return result


def _cache_policy(request: Request) -> CachePolicy:
    """What the request says about the cache.

    Source: RFC 9111, 5.2.1: `no-cache` asks for a new result, which may be kept; `no-store` asks to keep nothing.
    """
    fields = ",".join(request.headers.getlist("cache-control"))
    directives = {directive.strip().lower() for directive in fields.split(",")}
    if "no-store" in directives:
        return "bypass"
    return "refresh" if "no-cache" in directives else "use"


def timings(*results: EncodeResult) -> dict[str, str]:
    """The response headers of what was encoded one after the other, in milliseconds."""
    return {
        "x-tokenization-time": f"{sum(result.tokenization_ms for result in results):.2f}",
        "x-queue-time": f"{sum(result.queue_ms for result in results):.2f}",
        "x-inference-time": f"{sum(result.inference_ms for result in results):.2f}",
        "x-cache": max((result.cache for result in results), key=("hit", "coalesced", "miss").index),
    }
