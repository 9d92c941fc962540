"""Where the time of a request went. No test looks at how long anything took, only at what adds up."""

import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from encoder import TextEncoder
from encoder.types import Job
from tests.conftest import RunningServer, Start, run_server

STAGES = ["receive", "parse", "tokenize", "queue", "inference", "serialize"]
ROUNDING = 0.005 * 10  # ms: a line has ten numbers of two decimals


@pytest.fixture(scope="module")
def profiled() -> Iterator[RunningServer]:
    with run_server(profile=True) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture
def client(profiled: RunningServer, caplog: pytest.LogCaptureFixture) -> Iterator[httpx.Client]:
    caplog.set_level(logging.INFO, logger="app.profiler")
    with httpx.Client(base_url=profiled.url, timeout=60) as client:
        yield client


def profile_of(response: httpx.Response, caplog: pytest.LogCaptureFixture) -> str:
    """The line about a request, which is logged after the response has been sent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in caplog.messages:
            if f"request={response.headers['x-request-id']}" in line:
                return line
        time.sleep(0.01)
    raise AssertionError("the request was not logged")


def stages_of(line: str) -> tuple[dict[str, float], float]:
    """The stages of a line, and their total."""
    stages, rest = line.removeprefix("POST /encode: ").split(" = ")
    return {name: float(ms) for name, ms in (stage.split() for stage in stages.split(" + "))}, float(rest.split()[0])


def test_a_line_for_each_request_says_where_its_time_went(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.post("/encode", json={"prompt": "a cat", "preset": "z-image"})

    stages, total = stages_of(profile_of(response, caplog))
    assert list(stages) == [*STAGES, "send", "other"]
    assert min(stages.values()) >= 0
    assert sum(stages.values()) == pytest.approx(total, abs=ROUNDING)
    assert f"{len(response.content):,} bytes" in caplog.text


def test_the_line_describes_the_forward_pass(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "a cat in a pass", "preset": "flux2-klein", "max_sequence_length": 64}
    miss, hit = (profile_of(client.post("/encode", json=body), caplog) for _ in range(2))
    num_tokens = client.post("/encode", json=body, headers={"accept": "application/json"}).json()["num_tokens"][0]

    assert f"miss; last pass: 27 layers, 64 tokens ({num_tokens} real) of 1 prompts, forward" in miss
    parts = [float(ms) for ms in re.findall(r"(?:forward|selection) (\d+\.\d\d)", miss)]
    assert len(parts) == 2
    assert sum(parts) <= stages_of(miss)[0]["inference"] + ROUNDING
    assert "hit" in hit
    assert "pass" not in hit


def test_who_joins_a_pass_is_told_its_own_wait(
    profiled: RunningServer, client: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass had run before the request came, and that time is not the request's."""
    begin, started, release = TextEncoder.begin, threading.Event(), threading.Event()

    def begin_when_released(encoder: TextEncoder, jobs: Sequence[Job]) -> Any:
        started.set()
        release.wait()
        return begin(encoder, jobs)

    monkeypatch.setattr(TextEncoder, "begin", begin_when_released)
    body = {"prompt": "a cat that two ask for", "preset": "flux2-klein"}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/encode", json=body)
        started.wait()
        time.sleep(0.1)
        joined = pool.submit(client.post, "/encode", json=body)
        while not profiled.app.state.service.engine.stats().cache_coalesced:
            time.sleep(0.01)
        release.set()
        line = profile_of(joined.result(), caplog)
        first.result()

    assert "coalesced; last pass: 27 layers, 512 tokens" in line
    assert min(stages_of(line)[0].values()) >= 0


def test_browsers_get_it_as_a_header(client: httpx.Client) -> None:
    response = client.post("/encode", json={"prompt": "a cat"})

    entries = [entry.strip().split(";dur=") for entry in response.headers["server-timing"].split(",")]
    assert [name for name, _ in entries] == STAGES
    assert sum(float(ms) for _, ms in entries) <= response.elapsed.total_seconds() * 1e3


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", "/livez", b""), ("GET", "/presets", b""), ("POST", "/nowhere", b"{}")],
)
def test_requests_without_stages_are_not_logged(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, method: str, path: str, body: bytes
) -> None:
    response = client.request(method, path, content=body)
    later = client.post("/encode", json={"prompt": "a cat"})

    profile_of(later, caplog)
    assert response.headers["x-request-id"] not in caplog.text
    assert "server-timing" not in response.headers


def test_percentiles_are_logged_at_the_end(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="app.profiler")
    with start_server(profile=True) as server:
        server.wait_until_ready()
        for _ in range(3):
            httpx.post(f"{server.url}/encode", json={"prompt": "a cat"})

    title, head, *rows = caplog.messages[-1].splitlines()
    assert title == "percentiles of the last 3 requests, ms:"
    assert head.split() == ["stage", "p50", "p90", "p99"]
    assert [row.split()[0] for row in rows] == [*STAGES, "send", "other", "total"]
    for row in rows:
        p50, p90, p99 = (float(ms) for ms in row.split()[1:])
        assert 0 <= p50 <= p90 <= p99


def test_without_the_setting_nothing_is_measured(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="app.profiler")
    with start_server() as server:
        server.wait_until_ready()
        response = httpx.post(f"{server.url}/encode", json={"prompt": "a cat"})
        assert not server.app.state.service.engine._guardian.generation.encoder.measures_passes

    assert "server-timing" not in response.headers
    assert not [record for record in caplog.records if record.name == "app.profiler"]
