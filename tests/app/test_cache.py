"""The cache as clients and operators see it: headers, metrics, restarts, several services on one folder."""

import signal
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import wire
from tests.app.running import PATIENCE_S, Served, Spawn, metric, wait_for
from tests.conftest import Start

BODY = {"prompt": "a cat", "preset": "flux2-klein", "max_sequence_length": 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def serve(spawn: Spawn, folder: Path) -> Callable[..., Served]:
    """Starts a service in a process of its own that keeps its results in `folder`."""
    return lambda *flags: Served(spawn("serve", "--port", "0", "--disk-cache-dir", str(folder), *flags))


def stop(served: Served) -> None:
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(PATIENCE_S) == 0, "".join(served.lines)


def results(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def encode(url: str, **body: Any) -> httpx.Response:
    # No certificates are read for plain HTTP; reading them would take longer than the request.
    return httpx.post(f"{url}/encode", json=BODY | body, timeout=60, verify=False).raise_for_status()


def numbers(response: httpx.Response) -> bytes:
    return bytes(wire.unpack(response.content)["hidden_states"].tobytes())


@pytest.mark.parametrize(
    ("directives", "caches"),
    [
        pytest.param(["no-cache"], ["miss", "miss", "hit"], id="no-cache reads nothing and keeps the result"),
        pytest.param(["no-store"], ["miss", "miss", "miss"], id="no-store keeps nothing"),
        pytest.param(["No-Store, no-cache"], ["miss", "miss", "miss"], id="both"),
        pytest.param(["max-age=0, NO-CACHE"], ["miss", "miss", "hit"], id="among others"),
        pytest.param(["max-age=60", "no-store"], ["miss", "miss", "miss"], id="in a second line"),
        pytest.param(["only-if-cached"], ["miss", "hit", "hit"], id="an unknown one"),
    ],
)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/encode", lambda prompt: {"prompt": prompt}, id="encode"),
        pytest.param("/predict?preset=z-image", lambda prompt: {"prompt": prompt}, id="predict"),
        pytest.param("/te", lambda prompt: prompt, id="te"),
        pytest.param("/sglang/encode", lambda prompt: {"prompt": prompt}, id="sglang"),
        pytest.param("/v1/hidden_states", lambda prompt: {"input": prompt}, id="hidden_states"),
    ],
)
def test_cache_control_is_honoured(
    client: httpx.Client, path: str, body: Callable[[str], Any], directives: list[str], caches: list[str]
) -> None:
    """Twice with the header, then once without."""
    prompt = f"{path} with {directives}"  # one that no other case has asked
    headers = [("cache-control", directive) for directive in directives]
    given = [client.post(path, json=body(prompt), headers=headers).headers["x-cache"] for _ in range(2)]
    plain = client.post(path, json=body(prompt)).headers["x-cache"]

    assert [*given, plain] == caches


def test_a_restarted_service_answers_from_disk(serve: Callable[..., Served], folder: Path) -> None:
    first_run = serve()
    first = encode(first_run.url)
    stop(first_run)
    second_run = serve()
    again = encode(second_run.url)
    with httpx.Client(base_url=second_run.url) as client:
        counted = {name: metric(client, f"qwen3_encoder_{name}") for name in ("disk_cache_hits_total", "batches_total")}
        [entry] = results(folder)
        assert metric(client, "qwen3_encoder_disk_cache_bytes") >= entry.stat().st_size
        assert metric(client, "qwen3_encoder_disk_cache_entries") == 1

    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    assert (
        wire.unpack(again.content)["hidden_states"].tobytes() == wire.unpack(first.content)["hidden_states"].tobytes()
    )
    assert counted == {"disk_cache_hits_total": 1, "batches_total": 0}


def test_a_kill_loses_nothing_that_was_written(serve: Callable[..., Served], folder: Path) -> None:
    served = serve()
    encode(served.url)
    wait_for(lambda: len(results(folder)) == 1)
    served.process.kill()
    served.process.wait(PATIENCE_S)

    assert encode(serve().url).headers["x-cache"] == "hit"


def test_two_services_share_a_folder(serve: Callable[..., Served], folder: Path) -> None:
    """Both under load, with room for few results and memory for none, so that each reads and evicts the other's."""
    flags = ("--cache-bytes", "0", "--disk-cache-bytes", str(5 * 16_384))
    services = [serve(*flags), serve(*flags)]
    prompts = [f"prompt {number % 7}" for number in range(60)]
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda n: encode(services[n % 2].url, prompt=prompts[n]), range(len(prompts))))
    for served in services:
        stop(served)

    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert sum(sizes) <= (5 + 1) * 16_384
    assert {reply.status_code for reply in replies} == {200}
    assert "WARNING" not in "".join(line for served in services for line in served.lines if str(folder) in line)
    for prompt in set(prompts):
        bodies = [reply for reply, asked in zip(replies, prompts, strict=True) if asked == prompt]
        arrays = [wire.unpack(reply.content)["hidden_states"].float32() for reply in bodies]
        assert all(abs(array - arrays[0]).max() <= 0.02 * abs(arrays[0]).max() for array in arrays)


def test_what_was_asked_is_readable_by_its_owner_alone(start_server: Start, folder: Path) -> None:
    with start_server(disk_cache_dir=folder) as server:
        server.wait_until_ready()
        encode(server.url)

    [entry] = results(folder)
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_no_store_writes_nothing_to_disk(start_server: Start, folder: Path) -> None:
    with start_server(disk_cache_dir=folder) as server:
        server.wait_until_ready()
        httpx.post(f"{server.url}/encode", json=BODY, headers={"cache-control": "no-store"}).raise_for_status()

    assert results(folder) == []


def test_a_folder_that_cannot_be_written_fails_no_request(start_server: Start) -> None:
    with start_server(disk_cache_dir=Path("/proc/results")) as server, httpx.Client(base_url=server.url) as client:
        server.wait_until_ready()
        caches = [encode(server.url).headers["x-cache"] for _ in range(2)]
        wait_for(lambda: metric(client, "qwen3_encoder_disk_cache_errors_total") >= 2)

    assert caches == ["miss", "hit"]
