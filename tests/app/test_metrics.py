"""What Prometheus scrapes: well-formed, bounded, and formatted beside the event loop."""

import random
import shutil
import string
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import exposition, metrics
from app.profile import STAGES
from app.service import service_of
from app.versions import version_of
from encoder import Distribution, RequestStage
from tests.app.running import MANY, ONE_BY_ONE, TOKENS, abandoned_request, metric, wait_for
from tests.conftest import RunningServer, Start

PROMTOOL = shutil.which("promtool")


def samples(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every value by its name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def growth(client: httpx.Client, names: Iterable[str], send: Callable[[], object]) -> dict[str, float]:
    """How much metrics without labels grow by what `send` does."""
    before = samples(client)
    send()
    after = samples(client)
    keys = {name: (f"qwen3_encoder_{name}", ()) for name in names}
    return {name: after[key] - before[key] for name, key in keys.items()}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed; it is in Debian's package prometheus")
def test_promtool_finds_no_fault(client: httpx.Client) -> None:
    client.post("/encode", json={"prompt": "a cat"})
    client.post("/encode", json={"prompt": 5})

    found = subprocess.run(
        [str(PROMTOOL), "check", "metrics"], input=client.get("/metrics").content, capture_output=True
    )

    assert (found.returncode, found.stdout, found.stderr) == (0, b"", b"")


def test_the_series_do_not_grow_with_what_clients_send(client: httpx.Client) -> None:
    """Each series is memory in Prometheus for ever."""
    chance = random.Random(5)

    def word() -> str:
        return "".join(chance.choices(string.ascii_letters, k=12))

    def requests() -> Iterator[dict[str, Any]]:
        for _ in range(300):
            yield {"method": "GET", "url": f"/{word()}/{word()}"}
            yield {"method": chance.choice(["PUT", "PROPFIND", "DELETE"]), "url": "/encode"}
            yield {
                "method": "GET",
                "url": "/livez",
                "headers": {word(): word(), "x-request-id": word(), "accept": word()},
            }

    for request in [*requests()][:30]:
        client.request(**request)
    samples(client)  # which has a series of its own from the second time on
    before = samples(client)
    for request in requests():
        client.request(**request)

    assert samples(client).keys() - before.keys() == set()


def test_errors_are_counted_by_their_code(client: httpx.Client) -> None:
    before = {code: metric(client, "qwen3_encoder_errors_total", code=code) for code in ("invalid_field", "not_found")}

    client.post("/encode", json={"prompt": 5})
    client.get("/nowhere")

    for code, count in before.items():
        assert metric(client, "qwen3_encoder_errors_total", code=code) == count + 1


def test_a_deadline_is_counted_by_the_stage_that_it_ended_in(start_server: Start) -> None:
    """The log says it as well: which stage is too slow is what an operator asks first."""
    with start_server(request_timeout_s=1e-9) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        before = samples(client)
        assert client.post("/encode", json={"prompt": "a cat"}).status_code == 504
        after = samples(client)

    expired = {key: after[key] - before[key] for key in after if key[0] == "qwen3_encoder_deadlines_exceeded_total"}
    assert sum(expired.values()) == 1
    assert {dict(labels)["stage"] for _, labels in expired} == set(get_args(RequestStage))


def test_a_request_that_waits_shows_in_every_gauge(start_server: Start) -> None:
    """And in none once its client has left."""
    with start_server(**ONE_BY_ONE) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        with abandoned_request(f"{server.url}/encode", {"prompts": MANY}):
            wait_for(lambda: gauges(client)["queued_prompts"] > 1)
            waiting = gauges(client)
        wait_for(lambda: gauges(client)["queued_prompts"] == 0)
        wait_for(lambda: gauges(client)["reply_bytes"] == 0)
        left = gauges(client)

    assert waiting["queued_requests"] == 1
    assert waiting["queued_tokens"] == waiting["queued_prompts"] * TOKENS <= waiting["queue_limit_tokens"]
    assert waiting["active_requests"] == waiting["connections working"] == 2  # one of them is the scrape
    assert 0 < waiting["reply_bytes"] <= waiting["reply_limit_bytes"]
    assert waiting["engine_state ready"] == left["engine_state ready"] == 1
    assert left["queued_requests"] == left["queued_tokens"] == 0
    assert left["active_requests"] == 1


def test_connections_may_end_while_they_are_counted(server: RunningServer) -> None:
    """A scrape is on a thread of its own."""
    connections = service_of(server.app).traffic.connections

    class Ending:
        @property
        def state(self) -> str:
            connections.discard(self)  # type: ignore[arg-type]
            return "closing"

    connections.update([Ending(), Ending()])  # type: ignore[list-item]

    assert service_of(server.app).traffic.states()["closing"] == 2


def gauges(client: httpx.Client) -> dict[str, float]:
    """Values by name, and the value of its label if it has one."""
    named = {
        " ".join([name, *(value for _, value in labels)]): value for (name, labels), value in samples(client).items()
    }
    return {name.removeprefix("qwen3_encoder_"): value for name, value in named.items()}


def test_every_stage_of_a_request_is_timed(client: httpx.Client) -> None:
    names = [f"{name}_seconds_count" for name, _ in STAGES.values()]

    grown = growth(client, names, lambda: client.post("/encode", json={"prompt": "a cat"}))

    assert min(grown.values()) >= 1


def test_a_batch_is_counted_by_its_size_and_tokens(client: httpx.Client) -> None:
    names = ["batch_size_count", "batch_size_sum", "batch_tokens_sum", "padded_tokens_total", "prompts_total"]
    body = {"prompts": ["a cat in a batch", "a dog in a batch"]}

    grown = growth(client, names, lambda: client.post("/encode", json=body))

    assert grown["batch_size_count"] >= 1
    assert grown["batch_size_sum"] == grown["prompts_total"] == 2
    assert grown["batch_tokens_sum"] == grown["padded_tokens_total"] > 0


def test_a_value_is_counted_in_the_bucket_that_it_fills() -> None:
    """A bucket's bound belongs to it, as Prometheus's label `le` says."""
    distribution = Distribution((1, 2.5, 5))
    for value in (0, 1, 2, 5, 6):
        distribution.observe(value)

    assert list(distribution.cumulative()) == [(1, 2), (2.5, 3), (5, 4), (float("inf"), 5)]
    assert distribution.total == 14


def test_a_scrape_that_hangs_holds_up_neither_requests_nor_its_client(
    server: RunningServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And scrapes at the same time share one, so that many cost no more than one."""
    release, rendered = threading.Event(), []
    generate = metrics.generate_latest

    def hang(*arguments: Any) -> bytes:
        rendered.append(1)
        release.wait()
        return generate(*arguments)

    monkeypatch.setattr(metrics, "generate_latest", hang)
    admission = service_of(server.app).admission
    with ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(metrics, "MAX_SCRAPE_S", 60.0)
        scrapes = [pool.submit(httpx.get, f"{server.url}/metrics", timeout=60) for _ in range(4)]
        wait_for(lambda: bool(rendered) and len(admission) == 4)
        assert client.post("/encode", json={"prompt": "a cat"}).status_code == 200
        monkeypatch.setattr(metrics, "MAX_SCRAPE_S", 0.05)
        late = client.get("/metrics")
        release.set()
        assert [scrape.result().status_code for scrape in scrapes] == [200] * 4

    assert (late.status_code, late.json()["error"]["code"]) == (503, "not_ready")
    assert len(rendered) == 1
    assert client.get("/metrics").status_code == 200


def test_the_versions_and_the_model_are_named(server: RunningServer, client: httpx.Client) -> None:
    info = service_of(server.app).engine.info
    labels = dict(next(labels for name, labels in samples(client) if name == "qwen3_encoder_model_info"))

    assert (labels["model"], labels["device"], labels["forward"]) == (info.model, info.device, info.forward)
    assert {name for name, _ in samples(client)} >= {"qwen3_encoder_build_info", "process_resident_memory_bytes"}


def test_what_runs_from_its_sources_has_metrics_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """No version is known then."""
    monkeypatch.setattr(exposition, "version_of", lambda package: None)
    exposition._versions.cache_clear()

    assert {exposition._versions()["version"], exposition._versions()["mlx"]} == {"unknown"}
    exposition._versions.cache_clear()
    assert version_of("a-package-that-nobody-has") is None
