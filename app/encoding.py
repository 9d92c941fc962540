"""The engine as one request sees it: what every route that answers with hidden states shares."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends, Request

from app import profile
from app.disconnect import unless_disconnected
from app.metrics import Metrics
from app.settings import Settings
from encoder import CachePolicy, DType, EncodeResult, Engine, Preset


class Encoding:
    """Encodes prompts for one request: within its time, for as long as its client stays, and counted in the metrics."""

    def __init__(self, request: Request, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._request = request
        self._engine = engine
        self._timeout_s = settings.request_timeout_s
        self._metrics = metrics

    async def encode(self, prompts: Sequence[str], preset: Preset, dtype: DType) -> EncodeResult:
        """The hidden states of the prompts. Errors: those of Engine.encode, ClientDisconnected."""
        work = self._engine.encode(prompts, preset, dtype, self._timeout_s, self._cache_policy())
        result = await unless_disconnected(self._request, work)
        self._metrics.observe_result(result)
        profile.record(result)
        return result

    def _cache_policy(self) -> CachePolicy:
        """What the request says about the cache.

        Source: RFC 9111, 5.2.1: `no-cache` asks for a new result, which may be kept; `no-store` asks to keep nothing.
        """
        fields = ",".join(self._request.headers.getlist("cache-control"))
        directives = {directive.strip().lower() for directive in fields.split(",")}
        if "no-store" in directives:
            return "bypass"
        return "refresh" if "no-cache" in directives else "use"


async def get_encoding(request: Request) -> Encoding:
    """The engine for this request."""
    state = request.app.state
    return Encoding(request, state.engine, state.settings, state.metrics)


EncodingDep = Annotated[Encoding, Depends(get_encoding)]


def timings(*results: EncodeResult) -> dict[str, str]:
    """The response headers of what was encoded one after the other, in milliseconds."""
    return {
        "x-tokenization-time": f"{sum(result.tokenization_ms for result in results):.2f}",
        "x-queue-time": f"{sum(result.queue_ms for result in results):.2f}",
        "x-inference-time": f"{sum(result.inference_ms for result in results):.2f}",
        "x-cache": max((result.cache for result in results), key=("hit", "coalesced", "miss").index),
    }
