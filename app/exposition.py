"""What a scrape shows: the names of our metrics, and where each number is.

Names and labels are those of Prometheus's conventions: base units, `_total` for counters, `_info` for constants.
"""

import logging
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from math import isinf
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.admission import Admission
from app.http.traffic import CONNECTION_STATES, TIMEOUTS, Traffic
from app.log_pipe import PipeHandler
from app.metrics import Metrics
from app.profile import STAGES
from app.versions import version_of
from encoder import Distribution, Engine, NotReady, StateName

NAMESPACE = "qwen3_encoder"

# Names of EngineStats.
GAUGES = {
    "tokenizing_requests": "Requests whose prompts wait for the tokenizer or are tokenized, except short ones.",
    "tokenizing_chars": "Characters of those requests that wait for the tokenizer or are tokenized.",
    "queued_requests": "Requests of which a prompt waits for the model.",
    "queued_prompts": "Prompts that wait for the model.",
    "queued_tokens": "Padded tokens that wait for the model.",
    "running_prompts": "Prompts in forward passes that have not ended.",
    "cache_bytes": "Memory of cached results, in bytes.",
    "cache_entries": "Results cached in memory.",
    "disk_cache_bytes": "Size of the folder with cached results, in bytes, when it was last counted.",
    "disk_cache_entries": "Results in the folder, when it was last counted.",
    "mlx_active_bytes": "Memory that MLX uses, in bytes.",
    "mlx_cache_bytes": "Memory that MLX keeps for reuse, in bytes.",
    "mlx_peak_bytes": "Largest memory that MLX has used, in bytes.",
    "page_locked_bytes": "Page-locked memory of the host that a GPU copies results to, in bytes.",
}
COUNTERS = {
    "restarts": "How often the model was loaded again because it was broken.",
    "probes_failed": "How often a model that was suspect turned out to be broken.",
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
DISTRIBUTIONS = {
    "batch_size": "Prompts of a forward pass.",
    "batch_tokens": "Tokens of a forward pass, including all padding.",
}
MODEL = ("model", "revision", "device", "compute_dtype", "quantization", "forward")  # of ModelInfo


class Exposition(Collector):
    """Reads all numbers of one app. Any thread may collect."""

    def __init__(self, engine: Engine, metrics: Metrics, admission: Admission, traffic: Traffic) -> None:
        self._started_at = time.time()
        self._engine = engine
        self._metrics = metrics
        self._admission = admission
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        """One metric family after the other."""
        yield from self._about()
        yield from self._state()
        yield from self._requests()
        yield from self._connections()
        yield from self._work()
        text = "Lines of the log that were not read in time, or could not be written."
        handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, PipeHandler)]
        lost = sum(handler.lost_lines for handler in handlers)
        yield CounterMetricFamily(_name("log_lines_dropped"), text, value=lost)

    def _about(self) -> Iterator[Metric]:
        yield _info("build_info", "Versions of the service.", _versions())
        yield _gauge("start_time_seconds", "When the service started, in seconds since the epoch.", self._started_at)
        try:
            info = self._engine.info
        except NotReady:
            loaded = None
        else:
            loaded = {name: str(getattr(info, name) or "") for name in MODEL}
        yield _info("model_info", "The model that is loaded.", loaded, MODEL)

    def _state(self) -> Iterator[Metric]:
        now = self._engine.state
        states = {state: int(state == now) for state in get_args(StateName)}
        yield _gauges("engine_state", "1 for the state that the engine is in, 0 for all others.", "state", states)
        yield _gauge(
            "draining", "Whether the service is shutting down and takes no new work.", self._admission.draining
        )

    def _requests(self) -> Iterator[Metric]:
        counts = self._metrics
        yield _gauge("active_requests", "Requests whose response has not begun.", len(self._admission))
        requests = CounterMetricFamily(_name("requests"), "Answered requests.", labels=["route", "status"])
        for (route, status), count in counts.requests.copy().items():
            requests.add_metric([route, str(status)], count)
        yield requests
        errors = dict(counts.errors)
        for code, count in self._traffic.refusals.copy().items():
            errors[code] = errors.get(code, 0) + count
        text = "Requests answered with an error, by its code, and what was refused before it was a request."
        yield _counters("errors", text, "code", errors)
        text = "Requests whose time was over, by the stage that they were in then."
        yield _counters("deadlines_exceeded", text, "stage", dict(counts.expired))
        seconds = _histogram("request_seconds", "Time from request to response header.", ["route"])
        for route, distribution in counts.seconds.copy().items():
            _add(seconds, distribution, [route])
        yield seconds
        for stage, (name, text) in STAGES.items():
            yield _add(_histogram(f"{name}_seconds", text), counts.stages[stage])
        yield _add(_histogram("prompt_tokens", "Tokens of a prompt, including its template."), counts.prompt_tokens)

    def _connections(self) -> Iterator[Metric]:
        traffic = self._traffic
        states = dict.fromkeys(CONNECTION_STATES, 0) | traffic.states()
        yield _gauges("connections", "Open connections, by what they are at.", "state", states)
        yield _gauge("connections_limit", "Connections that may be open at once.", traffic.max_connections)
        timeouts = dict.fromkeys(TIMEOUTS, 0) | traffic.timeouts
        text = "Connections and requests that were ended because they were too slow, by what they were at."
        yield _counters("timeouts", text, "kind", timeouts)
        for name, text, budget in (
            ("arriving", "Memory of requests that have arrived and are not answered", traffic.arriving),
            ("reply", "Memory of results and replies, from planning until they are sent", traffic.replies),
        ):
            yield _gauge(f"{name}_bytes", f"{text}, in bytes.", budget.taken)
            yield _gauge(f"{name}_limit_bytes", f"{text}: the most that is allowed, in bytes.", budget.limit)

    def _work(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        limits = self._engine.limits
        yield _gauge("queue_limit_tokens", "Padded tokens that may wait.", limits.max_queue_tokens)
        text = "Characters that may wait for the tokenizer."
        yield _gauge("tokenizing_limit_chars", text, limits.max_tokenizing_chars)
        for name, text in GAUGES.items():
            yield _gauge(name, text, getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(_name(name), text, value=getattr(stats, name))
        for name, text in DISTRIBUTIONS.items():
            yield _add(_histogram(name, text), getattr(stats, name))


@cache  # it reads files
def _versions() -> dict[str, str]:
    installed = {"version": version_of("qwen3-encoder"), "mlx": version_of("mlx"), "python": platform.python_version()}
    return {name: version or "unknown" for name, version in installed.items()}


def _name(name: str) -> str:
    return f"{NAMESPACE}_{name}"


def _info(name: str, text: str, values: Mapping[str, str] | None, labels: Iterable[str] = ()) -> Metric:
    """A gauge of 1 whose labels are the information; no sample without values."""
    family = GaugeMetricFamily(_name(name), text, labels=tuple(labels or values or ()))
    if values is not None:
        family.add_metric(list(values.values()), 1)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_name(name), text, value=value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(_name(name), text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(_name(name), text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, labels: Iterable[str] = ()) -> HistogramMetricFamily:
    return HistogramMetricFamily(_name(name), text, labels=list(labels))


def _add(family: HistogramMetricFamily, distribution: Distribution, labels: Iterable[str] = ()) -> Metric:
    buckets = [("+Inf" if isinf(bound) else str(float(bound)), count) for bound, count in distribution.cumulative()]
    family.add_metric(list(labels), buckets, distribution.total)
    return family
