"""Prometheus metrics, in a registry of their own. The engine's gauges and counters are read at each scrape."""

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
    "running_prompts": "Prompts in forward passes that have not ended.",
    "cache_bytes": "Memory of cached results, in bytes.",
    "cache_entries": "Results cached in memory.",
    "disk_cache_bytes": "Size of the folder with cached results, in bytes, when it was last counted.",
    "disk_cache_entries": "Results in the folder, when it was last counted.",
    "active_memory_bytes": "Memory that MLX uses, in bytes.",
    "cache_memory_bytes": "Memory that MLX keeps for reuse, in bytes.",
    "peak_memory_bytes": "Largest memory that MLX has used, in bytes.",
}
COUNTERS = {
    "batches": "Forward passes.",
    "prompts": "Prompts that went through the model.",
    "real_tokens": "Tokens of prompts that went through the model, with the padding rows that presets deliver.",
    "padded_tokens": "Tokens that went through the model, including all padding.",
    "layers_run": "Decoder layers run, counted once for each batch.",
    "cache_hits": "Prompts answered from the cache in memory.",
    "cache_misses": "Prompts that had to be computed.",
    "cache_coalesced": "Prompts that joined an equal prompt in flight.",
    "cache_evictions": "Results removed from memory to make room.",
    "disk_cache_hits": "Prompts answered from the cache on disk.",
    "disk_cache_evictions": "Results that this process deleted from the folder to make room.",
    "disk_cache_errors": "Results that could not be read or written, including damaged ones.",
    "disk_cache_dropped": "Results not written because too many were waiting to be written.",
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
        self.request_seconds = self._histogram(
            "request_seconds", "Time from request to response header.", SECONDS, "route"
        )
        self.tokenization_seconds = self._histogram("tokenization_seconds", "Time to tokenize a request.", SECONDS)
        self.queue_seconds = self._histogram("queue_seconds", "Wait of a request until its last batch began.", SECONDS)
        self.inference_seconds = self._histogram(
            "inference_seconds", "Time of the forward pass of a request's last batch.", SECONDS
        )
        self.prompt_tokens = self._histogram("prompt_tokens", "Tokens of a prompt, including its template.", TOKENS)
        # Looking up a metric by its labels takes the library longer than counting.
        self._labelled = cache(
            lambda route, status: (self.requests.labels(route, str(status)), self.request_seconds.labels(route))
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace=NAMESPACE, registry=self.registry, buckets=buckets)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request. `route` is the path of the route, not of the request, which keeps labels few."""
        requests, request_seconds = self._labelled(route, status)
        requests.inc()
        request_seconds.observe(seconds)

    def observe_result(self, result: EncodeResult) -> None:
        """Record the times of an encoded request."""
        self.tokenization_seconds.observe(result.tokenization_ms / 1e3)
        self.queue_seconds.observe(result.queue_ms / 1e3)
        self.inference_seconds.observe(result.inference_ms / 1e3)
        for prompt in result.prompts:
            self.prompt_tokens.observe(len(prompt.input_ids))

    def render(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's own statistics, read at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One metric family for each statistic."""
        stats = asdict(self._engine.stats())
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"{NAMESPACE}_{name}", text, value=stats[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"{NAMESPACE}_{name}", text, value=stats[name])
