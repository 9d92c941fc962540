"""Log lines: text for people, JSON for programs; each names the request that it belongs to."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from app.log_format import JsonFormatter, add_request, formatter
from app.log_pipe import PipeHandler
from app.trace_context import trace_id
from tests.app.running import Served, Spawn, wait_for
from tests.conftest import RunningServer

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


class Lines(logging.Handler):
    """What is logged, as the service's own handler formats it."""

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self.setFormatter(formatter(log_format))
        self.addFilter(add_request)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines(log_format: str, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is logged during the test."""
    caplog.set_level(logging.INFO)
    handler = Lines(log_format)
    logging.getLogger().addHandler(handler)
    yield handler.lines
    logging.getLogger().removeHandler(handler)


def read(served: Served) -> list[dict[str, Any]]:
    """The objects that a service has logged."""
    return [json.loads(line) for line in served.lines]


def test_json_has_one_object_for_each_line(spawn: Spawn) -> None:
    """From the first line on, and also for what ends badly."""
    served = Served(spawn("serve", "--port", "0", "--log-format", "json"))
    url = re.search(r"http://[^/]+", str(served.lines))
    assert url
    with httpx.Client(base_url=url[0], headers={"x-request-id": "job-1", "traceparent": TRACEPARENT}) as client:
        client.post("/encode?secret=5", json={"prompt": "a confidential cat"}).raise_for_status()
        client.post(
            "/encode", json={"prompts": ["a confidential cat"], "layers": [1]}, headers={"x-request-id": "job-2"}
        )
    wait_for(lambda: any("job-2" in line for line in served.lines))

    [answered] = [line for line in read(served) if line.get("request_id") == "job-1"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", answered["ts"])
    assert {name: answered[name] for name in ("level", "trace_id", "method", "path", "route", "status")} == {
        "level": "info",
        "trace_id": TRACE,
        "method": "POST",
        "path": "/encode",
        "route": "/encode",
        "status": 200,
    }
    assert "code" not in answered
    assert set(answered["stages"]) >= {"receive", "tokenize", "queue", "inference", "serialize", "send"}
    assert answered["seconds"] >= answered["stages"]["inference"]
    [refused] = [line for line in read(served) if line.get("request_id") == "job-2"]
    assert (refused["status"], refused["code"]) == (422, "invalid_field")
    assert "confidential" not in str(served.lines)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_line_logged_while_a_request_is_served_has_its_id(
    server: RunningServer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever logs it."""

    def log_and_fail(*arguments: object) -> None:
        logging.getLogger("somebody").warning("on the way")
        raise KeyError("a bug")

    monkeypatch.setattr(server.app.state.service.engine, "encode", log_and_fail)
    httpx.post(
        f"{server.url}/encode", json={"prompt": "x"}, headers={"x-request-id": "job-3", "traceparent": TRACEPARENT}
    )
    httpx.get(f"{server.url}/livez")  # by its answer the first request's line is in the log

    own = [line for line in lines if "job-3" in line]
    assert [line for line in own if TRACE not in line] == []
    assert sum("on the way" in line for line in own) == 1
    assert sum("KeyError" in line for line in own) == 1
    assert sum("internal_error" in line for line in own) == 1


@pytest.mark.parametrize("log_format", ["text"])
def test_text_names_the_error_and_the_request(client: httpx.Client, lines: list[str]) -> None:
    client.post("/encode", json={}, headers={"x-request-id": "job-4"})
    client.get("/livez")

    [line] = [line for line in lines if "job-4" in line]
    assert re.search(r"POST /encode 422 invalid_field [\d.]+ ms.* request=job-4$", line)


def test_what_python_writes_itself_is_an_object_too() -> None:
    """Whoever reads the log parses every line, above all the last."""
    code = """
import logging, sys, threading, warnings
from app.cli import set_up_logging
set_up_logging("info", "json", logging.StreamHandler())
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("the end")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    objects = [json.loads(line) for line in ended.stderr.splitlines()]
    assert len(objects) == 3
    assert "a warning" in objects[0]["message"]
    assert "ZeroDivisionError" in objects[1]["exception"]
    assert "the end" in objects[2]["exception"]
    assert ended.returncode == 1


@pytest.mark.parametrize("log_format", ["text"])
def test_probes_and_scrapes_fill_no_log(client: httpx.Client, lines: list[str]) -> None:
    """Others do, and so do those that are refused."""
    for path in ("/livez", "/readyz", "/metrics", "/presets"):
        client.get(path)
    client.get("/livez", headers={"host": "evil.example"})
    client.get("/presets")
    client.get("/livez")  # by its answer the line before is in the log

    own = [line for line in lines if "app.request_context" in line]
    assert [re.findall(r"/\w+ \d+", line)[0] for line in own] == ["/presets 200", "/livez 421", "/presets 200"]


def test_a_line_about_dropped_lines_is_an_object_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the log parses every line."""
    monkeypatch.setattr("app.log_pipe.MAX_BYTES", 100)
    reader, writer = os.pipe()
    pipe = PipeHandler(writer)
    pipe.setFormatter(JsonFormatter())
    pipe.handle(logging.makeLogRecord({"msg": "x" * 1000}))
    pipe.handle(logging.makeLogRecord({"msg": ""}))
    pipe.flush()

    *_, told = (json.loads(line) for line in os.read(reader, 10_000).splitlines())
    os.close(reader)
    os.close(writer)
    assert told["message"].startswith("1 log lines were dropped")
    assert pipe.lost_lines == 1


def test_an_object_is_one_line_whatever_is_logged() -> None:
    message = 'a\nb\u2028c "d" \ud800'

    line = JsonFormatter().format(logging.makeLogRecord({"msg": message, "name": "x"}))

    assert line.isascii()
    assert line.splitlines() == [line]
    assert json.loads(line)["message"] == message


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param([TRACEPARENT], TRACE, id="valid"),
        pytest.param([f" {TRACEPARENT}\t"], TRACE, id="with white space"),
        pytest.param([TRACEPARENT[:-2] + "00"], TRACE, id="not sampled"),
        pytest.param(["cc" + TRACEPARENT[2:] + "-what-comes"], TRACE, id="of a later version"),
        pytest.param(["cc" + TRACEPARENT[2:] + ".what"], "", id="of a later version, malformed"),
        pytest.param([TRACEPARENT + "-more"], "", id="longer than its version allows"),
        pytest.param(["ff" + TRACEPARENT[2:]], "", id="of the invalid version"),
        pytest.param([TRACEPARENT.upper()], "", id="in capitals"),
        pytest.param([TRACEPARENT.replace(TRACE, "0" * 32)], "", id="trace of zeros"),
        pytest.param([TRACEPARENT.replace("b7ad6b7169203331", "0" * 16)], "", id="parent of zeros"),
        pytest.param([TRACEPARENT[:-1]], "", id="too short"),
        pytest.param([""], "", id="empty"),
        pytest.param([TRACEPARENT, TRACEPARENT], "", id="twice"),
    ],
)
def test_a_traceparent_counts_only_if_it_is_valid(headers: list[str], expected: str) -> None:
    assert trace_id(headers) == expected
