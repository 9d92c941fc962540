"""Which web pages may use the service."""

from collections.abc import Iterator

import httpx
import pytest

from app.request_context import SECURITY_HEADERS
from app.settings import SettingsError, load_settings
from tests.conftest import RunningServer, Start, run_server

PAGE = "https://pages.example"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def open_server() -> Iterator[RunningServer]:
    """A service for the pages of PAGE, with a key, ready."""
    with run_server(
        allowed_origins=(PAGE, "http://localhost:3000"), api_key="k", allowed_hosts=("encoder.lan",)
    ) as server:
        server.wait_until_ready()
        yield server


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 200, id="a program"),
        pytest.param({"origin": "http://127.0.0.1:9", "host": "127.0.0.1:9"}, 200, id="own page"),
        pytest.param({"origin": "https://LOCALHOST", "host": "localhost"}, 200, id="own page behind TLS"),
        pytest.param(
            {"origin": "https://a.example", "sec-fetch-site": "same-origin"}, 200, id="own page behind a proxy"
        ),
        pytest.param({"origin": "chrome-extension://a", "sec-fetch-site": "none"}, 200, id="extension"),
        pytest.param({"origin": PAGE}, 403, id="other page"),
        pytest.param({"origin": PAGE, "sec-fetch-site": "cross-site"}, 403, id="other page, marked"),
        pytest.param({"origin": "http://127.0.0.1:9", "sec-fetch-site": "same-site"}, 403, id="other port"),
        pytest.param({"origin": "http://127.0.0.1:90", "host": "127.0.0.1:9"}, 403, id="other port, unmarked"),
        pytest.param({"sec-fetch-site": "cross-site"}, 403, id="without origin"),
        pytest.param({"origin": "null"}, 403, id="sandboxed page"),
        pytest.param({"origin": "http://127.0.0.1:9@evil.example", "host": "127.0.0.1:9"}, 403, id="user info"),
    ],
)
def test_no_page_of_another_origin_makes_the_service_work(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    """Its reply would be hidden from the page, but the time it takes would tell which prompts are cached."""
    response = client.post("/tokenize", content='{"prompt": "a"}', headers=JSON | headers)

    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    if status == 403:
        assert "--allowed-origins" in response.json()["error"]["hint"]


def test_a_link_on_another_page_leads_to_the_documentation(client: httpx.Client) -> None:
    assert client.get("/docs", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_a_page_learns_nothing_of_a_service_that_names_no_origin(client: httpx.Client) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}

    for response in (client.options("/encode", headers=asked), client.get("/info", headers={"origin": PAGE})):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_a_browser_asks_without_a_key_and_gets_the_reply_with_it(open_server: RunningServer) -> None:
    asked = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,traceparent",
    }
    with httpx.Client(base_url=open_server.url, headers={"origin": PAGE, "sec-fetch-site": "cross-site"}) as client:
        preflight = client.options("/encode", headers=asked)
        reply = client.post("/encode", json={"prompt": "a"}, headers={"authorization": "Bearer k"})
        refused = client.post("/encode", json={"prompt": "a"})

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
    assert (reply.status_code, refused.status_code) == (200, 401)
    for response in (preflight, reply, refused):  # the page reads why it was refused
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://pages.example.evil.example", "http://pages.example"]
)
def test_pages_of_other_origins_get_no_answer(open_server: RunningServer, origin: str) -> None:
    asked = {"origin": origin, "access-control-request-method": "POST"}
    with httpx.Client(base_url=open_server.url) as client:
        preflight = client.options("/encode", headers=asked)
        reply = client.post("/encode", json={"prompt": "a"}, headers={"origin": origin, "authorization": "Bearer k"})

    assert (preflight.status_code, reply.status_code) == (400, 403)
    assert "access-control-allow-origin" not in {**preflight.headers, **reply.headers}


def test_the_host_is_checked_before_the_origin(open_server: RunningServer) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "host": "evil.example"}

    response = httpx.options(f"{open_server.url}/encode", headers=asked)

    assert response.status_code == 421
    assert "access-control-allow-origin" not in response.headers


def test_any_origin_may_be_allowed(start_server: Start) -> None:
    with start_server(allowed_origins=("*",)) as server:
        response = httpx.post(f"{server.url}/nothing", headers={"origin": PAGE, "sec-fetch-site": "cross-site"})

    assert response.status_code == 404
    assert response.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("origin", ["pages.example", "https://a/b", "https://", "https://u@a"])
def test_what_no_browser_sends_is_no_setting(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"--allowed-origins .* is no origin"):
        load_settings({"allowed_origins": f"{PAGE},{origin}"})


def test_an_origin_is_written_as_a_browser_writes_it() -> None:
    assert load_settings({"allowed_origins": "HTTPS://Pages.Example/, null"}).allowed_origins == (PAGE, "null")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/livez", {}, 200), ("/docs", {}, 200), ("/nothing", {}, 404), ("/livez", {"host": "evil"}, 421)],
)
def test_every_response_says_what_a_browser_may_do_with_it(
    client: httpx.Client, path: str, headers: dict[str, str], status: int
) -> None:
    response = client.get(path, headers=headers)

    assert response.status_code == status
    for name, value in SECURITY_HEADERS:
        assert response.headers.get_list(name.decode()) == [value.decode()]
