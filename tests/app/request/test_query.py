"""A query is read once it is known to be short, and each of its parameters has one value."""

import httpx
import pytest

from app.request.accept import MAX_LENGTH
from app.request.query import MAX_BYTES


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/encode", {"prompt": "a"}),
        ("/te", "a"),
        ("/v1/hidden_states", {"input": "a"}),
        ("/livez", None),
        ("/info", None),
    ],
)
def test_a_long_query_is_refused_on_every_route(client: httpx.Client, path: str, body: object) -> None:
    """FastAPI and Starlette parse thousands of parameters on the event loop."""
    method = "GET" if body is None else "POST"

    fits = client.request(method, f"{path}?{'a&' * (MAX_BYTES // 2)}", json=body)
    over = client.request(method, f"{path}?{'a&' * (MAX_BYTES // 2)}a", json=body)

    assert fits.status_code == 200
    assert (over.status_code, over.json()["error"]["code"]) == (414, "target_too_long")


@pytest.mark.parametrize(
    "target",
    [
        "/encode?encoding=float&encoding=base64",
        "/te?preset=z-image&preset=z-image",
        "/predict?dtype=float32&%64type=float16",
    ],
)
def test_a_parameter_comes_once(client: httpx.Client, target: str) -> None:
    response = client.post(target, json={"prompt": "a"})

    assert response.status_code == 422
    assert "comes twice in the query" in response.json()["error"]["message"]


def test_parameters_that_no_route_knows_are_ignored(client: httpx.Client) -> None:
    assert client.post("/encode?a=1&a=2", json={"prompt": "a"}).status_code == 200


def test_a_long_accept_header_is_refused_and_not_kept(client: httpx.Client) -> None:
    """The choice for a header is kept, so its length is bounded."""
    known = "application/json"
    fits, over = (known + ", text/plain;q=0.5" * 200)[:MAX_LENGTH], known + "," * MAX_LENGTH

    responses = [client.post("/encode", json={"prompt": "a"}, headers={"accept": header}) for header in (fits, over)]

    assert [response.status_code for response in responses] == [200, 406]
    assert "2,000 are read" in responses[1].json()["error"]["message"]
