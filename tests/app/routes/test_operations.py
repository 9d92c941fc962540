"""Liveness, readiness, metrics, and the description of the API."""

import time

import httpx
import pytest

from tests.app.running import metric
from tests.conftest import RunningServer, Start


def test_while_the_model_loads_the_service_is_alive_and_not_ready(start_server: Start) -> None:
    """From the first accepted connection on."""
    with start_server() as server, httpx.Client(base_url=server.url) as client:
        first = client.get("/readyz")
        answers = [(client.get("/livez").status_code, client.get("/readyz").status_code)]
        while answers[-1] != (200, 200):
            time.sleep(0.01)
            answers.append((client.get("/livez").status_code, client.get("/readyz").status_code))

    assert first.status_code == 503
    assert first.json()["error"]["code"] == "not_ready"
    assert int(first.headers["retry-after"]) > 0
    assert {livez for livez, _ in answers} == {200}
    assert {readyz for _, readyz in answers} == {200, 503}


@pytest.mark.parametrize("path", ["/readyz", "/health"])
def test_when_loaded_the_service_is_ready(client: httpx.Client, path: str) -> None:
    assert client.get(path).json() == {"status": "ready"}


def test_while_draining_the_service_is_alive_and_takes_no_work(start_server: Start) -> None:
    with start_server() as server, httpx.Client(base_url=server.url) as client:
        server.wait_until_ready()
        server.app.state.service.admission.draining = True
        refused = client.post("/encode", json={"prompt": "a cat"})
        statuses = [client.get(path).status_code for path in ("/livez", "/readyz", "/info")]

    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert statuses == [200, 503, 200]


def test_metrics_count_requests_by_route_and_status(client: httpx.Client) -> None:
    labels = {"route": "/encode", "status": "422"}
    before = metric(client, "qwen3_encoder_requests_total", **labels)

    client.post("/encode", json={})

    assert metric(client, "qwen3_encoder_requests_total", **labels) == before + 1


def test_metrics_of_unknown_paths_share_one_label(client: httpx.Client) -> None:
    """Else anybody could fill the memory of Prometheus."""
    client.get("/some/path/nobody/has")

    assert "nobody" not in client.get("/metrics").text
    assert metric(client, "qwen3_encoder_requests_total", route="(none)", status="404") > 0


def test_metrics_count_layers_tokens_and_cache(client: httpx.Client) -> None:
    names = ["layers_run_total", "batches_total", "real_tokens_total", "cache_misses_total", "cache_hits_total"]
    before = {name: metric(client, f"qwen3_encoder_{name}") for name in names}

    for _ in range(2):
        client.post("/encode", json={"prompt": "counted", "preset": "flux2-klein", "padding": "none"})

    grown = {name: metric(client, f"qwen3_encoder_{name}") - before[name] for name in names}
    assert grown["layers_run_total"] == 27
    assert grown["batches_total"] == grown["cache_misses_total"] == grown["cache_hits_total"] == 1
    assert grown["real_tokens_total"] > 7


def test_padding_rows_that_a_preset_delivers_are_no_waste(client: httpx.Client) -> None:
    """What nobody asked for is the difference between these two."""
    names = ["real_tokens_total", "padded_tokens_total"]
    before = {name: metric(client, f"qwen3_encoder_{name}") for name in names}

    client.post("/encode", json={"prompt": "live rows", "preset": "flux2-klein"})

    grown = [metric(client, f"qwen3_encoder_{name}") - before[name] for name in names]
    assert grown == [512, 512]


def test_metrics_time_the_steps(client: httpx.Client) -> None:
    client.post("/encode", json={"prompt": "a cat"})

    for step in ("tokenization", "queue", "inference"):
        assert metric(client, f"qwen3_encoder_{step}_seconds_count") > 0
    assert metric(client, "qwen3_encoder_request_seconds_count", route="/encode") > 0
    assert metric(client, "qwen3_encoder_mlx_active_bytes") > 0


def test_the_api_description_has_bodies_replies_and_errors(server: RunningServer) -> None:
    paths = server.app.openapi()["paths"]

    for path in ("/encode", "/encode_layers", "/tokenize"):
        body = paths[path]["post"]["requestBody"]["content"]
        assert {"application/json", "application/msgpack"} <= set(body)
        assert body["application/json"]["schema"]["properties"]["prompts"]
        assert body["application/json"]["examples"]
        assert {"200", "400", "401", "413", "415", "422", "503"} <= set(paths[path]["post"]["responses"])
    for path in ("/encode", "/encode_layers"):
        [parameter] = paths[path]["post"]["parameters"]
        assert (parameter["name"], parameter["schema"]["enum"]) == ("encoding", ["base64", "float"])
    replies = paths["/encode"]["post"]["responses"]["200"]["content"]
    assert {"application/msgpack", "application/json", "application/x-safetensors", "tensor/binary"} <= set(replies)


def test_the_examples_of_the_api_description_work(server: RunningServer, client: httpx.Client) -> None:
    for path, methods in server.app.openapi()["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            assert client.post(path, json=example["value"] | {"max_sequence_length": 32}).status_code == 200


def test_info_reads_no_files_again(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are in files of other packages; a service out of file descriptors cannot open them."""

    def fail(name: str) -> str:
        raise OSError(f"{name}: too many open files")

    first = client.get("/info")
    monkeypatch.setattr("app.routes.operations.version", fail)

    assert client.get("/info").json() == first.json()
