"""Spans, as a collector gets them."""

import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.profile import STAGES
from app.tracing import open_tracing
from tests.conftest import Start

pytest.importorskip("fastapi.telemetry", reason="this FastAPI makes no spans")
trace_service_pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Receives spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        super().__init__(("127.0.0.1", 0), Receiver)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Receiver(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces":
            for resource in trace_service_pb2.ExportTraceServiceRequest.FromString(body).resource_spans:
                names = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
                self.server.services.update(names)
                self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the environment names, and names without gzip, so that spans come as they are."""
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        yield collector
        collector.shutdown()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_a_request_is_a_span_below_its_caller_and_its_stages_are_spans_below_it(
    start_server: Start, collector: Collector
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "job-5"}
    with start_server() as server:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            client.post("/encode", json={"prompt": "a confidential cat"}).raise_for_status()
            client.post("/encode", json={}, headers={"traceparent": "00-malformed-01"})

    assert collector.services == {"qwen3-encoder"}
    answered, refused = sorted(
        (s for s in collector.spans if s.name == "POST /encode"), key=lambda s: s.start_time_unix_nano
    )
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE, PARENT)
    assert (
        attributes(answered).items()
        >= {
            "http.route": "/encode",
            "http.response.status_code": 200,
            "qwen3_encoder.request_id": "job-5",
        }.items()
    )
    stages = [span for span in collector.spans if span.parent_span_id == answered.span_id]
    assert [span.name for span in stages] == list(STAGES)
    for span in stages:
        assert span.trace_id == answered.trace_id
        assert answered.start_time_unix_nano - 10**6 < span.start_time_unix_nano <= span.end_time_unix_nano
    assert refused.trace_id.hex() != TRACE
    assert not refused.parent_span_id
    assert attributes(refused)["qwen3_encoder.code"] == "invalid_field"
    assert {span.name for span in collector.spans} == {"POST /encode", *STAGES}, "probes are traced"
    assert "confidential" not in str(collector.spans)


def test_a_collector_that_takes_nothing_holds_up_neither_requests_nor_the_end(
    start_server: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
        with start_server() as server:
            server.wait_until_ready()
            for _ in range(3):
                assert httpx.post(f"{server.url}/encode", json={"prompt": "a cat"}).status_code == 200

    assert "the last spans could not be sent" in caplog.text


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        pytest.param({}, "", id="nothing"),
        pytest.param({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "otlp"}, "", id="disabled"),
        pytest.param({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, "", id="none"),
        pytest.param({"OTEL_TRACES_EXPORTER": "zipkin"}, "expected exporter otlp", id="another exporter"),
        pytest.param(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "http/protobuf",
            id="gRPC",
        ),
        pytest.param(
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "there will be none", id="no sense"
        ),
    ],
)
def test_without_traces_the_service_serves_and_says_why(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert open_tracing() is None
    assert said in caplog.text
    ours = [record for record in caplog.records if record.name.startswith("app")]  # not an exporter of a test before
    assert bool(ours) == bool(said)


def test_the_sdk_is_not_needed() -> None:
    """Nothing of it is imported unless the environment asks for it; then its absence is a warning."""
    code = """
import os, sys
sys.modules["opentelemetry.sdk"] = None
from app.main import create_app
from app.settings import Settings
assert create_app(Settings()).state.service.tracing is None
print("asked", file=sys.stderr)
os.environ["OTEL_TRACES_EXPORTER"] = "otlp"
assert create_app(Settings()).state.service.tracing is None
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr
    before, after = ended.stderr.split("asked\n")
    assert before == ""
    assert "pip install 'qwen3-encoder[otel]'" in after
