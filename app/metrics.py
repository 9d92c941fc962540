"""Prometheus metrics, in a registry of the app's own. Gauges and counters of the engine are read when scraped."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from encoder import EncodeResult, Engine

NAMESPACE = "qwen3_encoder"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

GAUGES = {
    "queued_prompts": "Prompts that wait for the model.",
    "queued_tokens": "Padded tokens that wait for the model.",
    "running_prompts": "Prompts that the model has been given and whose results have not come back.",
    "cache_bytes": "Memory of cached results, in bytes.",
    "cache_entries": "Results cached in memory.",
    "disk_cache_bytes": "Size of the folder of cached results, in bytes, when it was last counted.",
    "disk_cache_entries": "Results in the folder, when it was last counted.",
    "active_memory_bytes": "Memory that MLX uses, in bytes.",
    "cache_memory_bytes": "Memory that MLX keeps for reuse, in bytes.",
    "peak_memory_bytes": "Most memory that MLX has used, in bytes.",
}
COUNTERS = {
    "batches": "Forward passes.",
    "prompts": "Prompts that went through the model.",
    "real_tokens": "Tokens of prompts that went through the model, and padding rows that a preset delivers live.",
    "padded_tokens": "Tokens that went through the model, all padding included.",
    "layers_run": "Decoder layers run, counted once for each batch.",
    "cache_hits": "Prompts answered from the cache in memory.",
    "cache_misses": "Prompts that had to be computed.",
    "cache_coalesced": "Prompts that joined an equal one in flight.",
    "cache_evictions": "Results that memory had no more room for.",
    "disk_cache_hits": "Prompts answered from the cache on disk.",
    "disk_cache_evictions": "Results that the folder had no more room for, as far as this process deleted them.",
    "disk_cache_errors": "Results that could not be read or written, damaged ones included.",
    "disk_cache_dropped": "Results not written because too many were waiting to be.",
}


class Metrics:
    """All metrics of one app."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.requests = Counter(
            "requests", "Answered requests.", ["route", "status"], namespace=NAMESPACE, registry=self.registry
        )
        self.request_seconds = self._histogram("request_seconds", "From request to response header.", SECONDS, "route")
        self.tokenization_seconds = self._histogram("tokenization_seconds", "Tokenization of a request.", SECONDS)
        self.queue_seconds = self._histogram("queue_seconds", "Wait of a request for the last of its batches.", SECONDS)
        self.inference_seconds = self._histogram(
            "inference_seconds", "Forward pass of the last of a request's batches.", SECONDS
        )
        self.prompt_tokens = self._histogram("prompt_tokens", "Tokens of a prompt, template included.", TOKENS)
        # The library's own way to a metric with labels takes longer than counting.
        self._labelled = cache(
            lambda route, status: (self.requests.labels(route, str(status)), self.request_seconds.labels(route))
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request. `route` is the path of the route, not of the request, so labels stay few."""
        requests, request_seconds = self._labelled(route, status)
        requests.inc()
        request_seconds.observe(seconds)

    def observe_result(self, result: EncodeResult) -> None:
        """Record what an encoded request took."""
        self.tokenization_seconds.observe(result.tokenization_ms / 1e3)
        self.queue_seconds.observe(result.queue_ms / 1e3)
        self.inference_seconds.observe(result.inference_ms / 1e3)
        for prompt in result.prompts:
            self.prompt_tokens.observe(len(prompt.input_ids))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's own numbers, taken at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family for each number."""
        stats = asdict(self._engine.stats())
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"{NAMESPACE}_{name}", text, value=stats[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"{NAMESPACE}_{name}", text, value=stats[name])
