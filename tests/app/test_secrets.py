"""What is secret stays out of the log at every level, of replies that others can ask for, and of the doctor's report.

Secret are keys and tokens, which clients send wherever they know a place for one, and what is in a request's body.
"""

import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgpack
import pytest

from app.attempts import ClientError
from app.client import Client
from app.doctor import Report, check_settings
from app.settings import Settings, load_settings
from encoder import CheckpointError
from encoder.checkpoint.files.hub_client import _as_checkpoint_errors
from encoder.checkpoint.files.hub_id import HubId
from tests.app.running import Served, wait_for

KEY = "sk-KEYSECRET"
SECRET = "SECRET"  # part of everything that must not appear
PROMPT = f"a {SECRET} cat"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service in a process of its own that logs all it can, and asks for KEY."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    flags = ("--api-key-file", str(keys), "--log-level", "debug", "--profile", "--request-timeout-s", "5")
    with subprocess.Popen(
        [sys.executable, "-m", "app", "serve", "--port", "0", *flags, "--max-prompt-chars", "1000"],
        env={**os.environ, "HF_TOKEN": f"hf_{SECRET}", "PYTHONDEVMODE": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        process.stderr = process.stdout
        served = Served(process)
        yield served
        served.end()


def bodies() -> Iterator[tuple[dict[str, str], bytes]]:
    """Content type and body: accepted, refused, damaged."""
    for document in (
        {"prompt": PROMPT},
        {"prompt": PROMPT, "preset": SECRET},
        {"prompt": PROMPT, "layers": [SECRET]},
        {"prompt": PROMPT, SECRET: SECRET},
        {"prompts": [PROMPT, 1, None, {SECRET: PROMPT}]},
        {"prompt": {SECRET: [PROMPT]}},
        {"prompt": PROMPT * 1000},
        {"prompt": PROMPT + "\ud800"},
        [PROMPT],
    ):
        yield JSON, json.dumps(document).encode()
        yield {"content-type": "application/msgpack"}, msgpack.packb(document, unicode_errors="surrogatepass")
    yield JSON, f'{{"prompt": "{PROMPT}"'.encode()
    yield JSON, f'{{"prompt": "{PROMPT}", "prompt": "{PROMPT}"}}'.encode()
    yield JSON, f'{{"prompt": {SECRET}}}'.encode()
    yield {"content-type": f"text/plain; {SECRET}"}, PROMPT.encode()
    yield {**JSON, "content-encoding": "gzip"}, PROMPT.encode()


HEADS = [
    f"GET / HTTP/1.1\r\nhost: {SECRET}@localhost",
    f"GET / HTTP/1.1\r\nhost: {SECRET}.example",
    f"GET http://user:{SECRET}@localhost/?token={SECRET} HTTP/1.1\r\nhost: localhost",
    f"GET {SECRET} HTTP/1.1\r\nhost: localhost",
    f"GET / HTTP/{SECRET}\r\nhost: localhost",
    f"{SECRET} / HTTP/1.1\r\nhost: localhost",
    f"GET / HTTP/1.1\r\nhost: localhost\r\n{SECRET}",
    f"GET / HTTP/1.1\r\nhost: localhost\r\n{SECRET} : a",
    f"GET / HTTP/1.1\r\nhost: localhost\r\na: {SECRET}\x00",
    f"POST /encode HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: {SECRET}",
    f"POST /encode HTTP/1.1\r\nhost: localhost\r\ncontent-length: {SECRET}",
    f"POST /encode HTTP/1.1\r\nhost: localhost\r\nexpect: {SECRET}",
    f"POST /encode HTTP/1.1\r\nhost: localhost\r\nupgrade: {SECRET}\r\nconnection: upgrade",
    f"POST /encode HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{SECRET}",
    PROMPT,
]


def send_all(url: httpx.URL) -> None:
    """Secrets in every place of a request."""
    tokens = {"cookie": SECRET, "x-api-key": SECRET, "proxy-authorization": SECRET, "traceparent": SECRET}
    others = [
        {"authorization": f"Bearer {SECRET}"},
        {"authorization": f"Basic {SECRET}"},
        {"authorization": SECRET},
        {"authorization": f"Bearer {KEY}", "origin": f"https://{SECRET}", **tokens},
        {"authorization": f"Bearer {KEY}", "accept": SECRET},
        {"authorization": f"Bearer {KEY}", "x-request-id": f"a {SECRET}"},
    ]
    with httpx.Client(base_url=url, timeout=60) as client:
        for headers in others:
            for path in ("/encode", "/nothing", "/predict", "/te", "/v1/hidden_states"):
                client.post(f"{path}?token={SECRET}&encoding={SECRET}", headers={**JSON, **headers}, content=b"{}")
        for headers, body in bodies():
            for path in ("/encode", "/encode_layers", "/tokenize", "/predict", "/te", "/sglang/encode"):
                client.post(path, headers={"authorization": f"Bearer {KEY}", **tokens, **headers}, content=body)
    for head in HEADS:
        with socket.create_connection((url.host, url.port), timeout=60) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode())
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


def test_no_secret_is_logged_or_shown(served: Served) -> None:
    """At the lowest level, with Python's own warnings, and the summary at the end."""
    url = httpx.URL(served.url)
    send_all(url)
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
        shown = "".join(client.get(path).text for path in ("/info", "/metrics", "/presets", "/openapi.json"))
        assert client.get("/last").status_code == 404
    wait_for(lambda: any("GET /last 404" in line for line in served.lines))
    served.process.terminate()
    served.process.wait(timeout=60)
    wait_for(lambda: any("percentiles" in line for line in served.lines))

    assert sum("POST /encode 200" in line for line in served.lines) >= 1
    assert sum("malformed_request to" in line for line in served.lines) >= 5
    assert [line for line in served.lines if SECRET in line] == []
    assert SECRET not in shown


def test_a_key_is_in_no_error_about_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in pydantic's own, which a traceback would show."""
    monkeypatch.setenv("QWEN3_ENCODER_API_KEY", f"{SECRET}\x01")

    with pytest.raises(ValueError, match="has a control character") as caught:
        Settings()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (f"https://user:{SECRET}@huggingface.co/Qwen/Qwen3-0.6B", "https://huggingface.co/Qwen/Qwen3-0.6B"),
        (f"https://huggingface.co/Qwen/Qwen3-0.6B?token={SECRET}", "https://huggingface.co/Qwen/Qwen3-0.6B"),
        (f"https://hf.co/a/b?token={SECRET}:0.5", "https://hf.co/a/b:0.5"),
        ("file:///models/a?b", "file:///models/a?b"),
        ("org/model@refs/pr/1", "org/model@refs/pr/1"),
    ],
)
def test_an_address_keeps_no_token(given: str, kept: str) -> None:
    """The model's name is logged, and in /info."""
    settings = load_settings({"model": given, "tokenizer": given, "lora": f"{given},x:2"})

    assert (settings.model, settings.tokenizer, settings.lora) == (kept, kept, (kept, "x:2"))


def test_a_failed_download_shows_no_signed_address() -> None:
    cause = f"403 for url 'https://u:{SECRET}@cdn.example/a?X-Amz-Signature={SECRET}&b=1' (x)"

    with (
        pytest.raises(CheckpointError, match=r"cdn\.example/a") as caught,
        _as_checkpoint_errors(HubId("a/b", "", None)),
    ):
        raise OSError(cause)
    assert SECRET not in str(caught.value)


def test_a_client_shows_no_password_of_its_proxy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    client = Client(f"http://user:{SECRET}@127.0.0.1:9", api_key=SECRET, timeout=0.5)

    with client, pytest.raises(ClientError) as caught:
        client.info()
    assert "127.0.0.1:9" in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text


def test_the_report_for_an_issue_has_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, report = tmp_path / "keys", Report()
    keys.write_text(f"{SECRET}\x00")
    monkeypatch.setenv("QWEN3_ENCODER_API_KEY", SECRET)
    monkeypatch.setenv("QWEN3_ENCODER_API_KEY_FILE", str(keys))
    monkeypatch.setenv("QWEN3_ENCODER_MODEL", f"https://user:{SECRET}@huggingface.co/Qwen/Qwen3-0.6B")

    report.sections["settings"] = check_settings(report)

    assert "QWEN3_ENCODER_API_KEY" in report.sections["settings"]
    assert "control character" in report.text()
    assert SECRET not in report.text() + report.json()
