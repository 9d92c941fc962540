"""By which names the service may be called."""

import socket

import httpx
import pytest

from app.access.host import Host, parse_host
from app.settings import SettingsError, load_settings
from tests.conftest import RunningServer, Start


@pytest.mark.parametrize(
    ("value", "host"),
    [
        ("a", Host("a", False)),
        ("A.b_c-d:1", Host("a.b_c-d", False)),
        ("a.:65535", Host("a", False)),
        ("a:", Host("a", False)),
        ("127.0.0.1:1", Host("127.0.0.1", True)),
        ("127.0.0.1.", Host("127.0.0.1", True)),
        ("[::1]", Host("::1", True)),
        ("[0:0::1]:80", Host("::1", True)),
        ("[2001:DB8::1]:80", Host("2001:db8::1", True)),
        ("[fe80::1%25eth0]:80", Host("fe80::1", True)),
        ("[fe80::1%eth0]", Host("fe80::1", True)),
        ("a.127.0.0.1", Host("a.127.0.0.1", False)),
        ("127.1", Host("127.1", False)),
        ("2130706433", Host("2130706433", False)),
        ("0x7f000001", Host("0x7f000001", False)),
        ("0177.0.0.1", Host("0177.0.0.1", False)),
        ("127.0.0.1%2eevil", Host("127.0.0.1%2eevil", False)),
        ("localhost..", Host("localhost.", False)),
    ],
)
def test_host_is_parsed(value: str, host: Host) -> None:
    assert parse_host(value) == host


@pytest.mark.parametrize(
    "value",
    [
        *("", ":80", "[]", "[]:80", "[", "]", "[::1", "::1", "::1]", "[::1]]", "[[::1]]", "[:::1]", "[1.2.3.4]"),
        *("[::1]evil", "[::1].evil.example", "[::1]:80.evil.example", "[::1]:80:80", "[::1%]", "[::1%a b]", "[v1.a]"),
        *("localhost:80:80", "localhost:http", "localhost:-1", "localhost:65536", "localhost:000080", "localhost: 80"),
        *("localhost@evil.example", "evil@localhost", "a@b:80", "http://localhost", "localhost/", "localhost?", "a#b"),
        "localhost evil",
        *("local\thost", "localhost\\evil", "a%", "a%2", "a%gg", "a\x00b", '"a"', "a\n", "é", "localhost\u0660"),
        *("localhost:\u0661", "a" * 301),
    ],
)
def test_what_is_no_host_and_port_is_refused(value: str) -> None:
    assert parse_host(value) is None


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST.:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.168.1.4:8000", 200),
        ("", 200),
        ("evil.example", 421),
        ("evil.example:8000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.localhost", 421),
        ("127.1", 421),
        ("[::1].evil.example", 400),
        ("[::1]evil", 400),
        ("localhost@evil.example", 400),
        ("localhost:80:80", 400),
    ],
)
def test_only_addresses_and_localhost_are_hosts(client: httpx.Client, host: str, status: int) -> None:
    """Else a web page could reach the service by DNS rebinding."""
    assert client.get("/livez", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [
        pytest.param({}, {"other.lan": 421, "192.168.1.4": 200}, id="loopback"),
        pytest.param({"host": "0.0.0.0"}, {"other.lan": 421, "192.168.1.4": 200}, id="all addresses"),
        pytest.param({"allowed_hosts": ("Encoder.lan.",)}, {"encoder.lan:8000": 200, "other.lan": 421}, id="named"),
        pytest.param({"allowed_hosts": ("*",)}, {"other.lan": 200}, id="any"),
    ],
)
def test_other_names_are_hosts_if_they_are_named(
    start_server: Start, settings: dict[str, object], statuses: dict[str, int]
) -> None:
    with start_server(**settings) as server, httpx.Client(base_url=f"http://127.0.0.1:{server.address[1]}") as client:
        found = {host: client.get("/livez", headers={"host": host}).status_code for host in statuses}

    assert found == statuses


def test_blanks_around_a_header_are_no_part_of_it(server: RunningServer) -> None:
    with socket.create_connection(server.address) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost:\t localhost \t\r\nconnection: close\r\n\r\n")

        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_refusal_names_the_setting(client: httpx.Client) -> None:
    error = client.get("/livez", headers={"host": "gpu-box:8000"}).json()["error"]

    assert error["code"] == "host_not_allowed"
    assert "'gpu-box'" in error["message"]
    assert "--allowed-hosts" in error["hint"]


@pytest.mark.parametrize("name", ["http://a", "a:80", "a/b", "bücher.example", "*.a", "a b"])
def test_what_no_host_header_can_name_is_no_setting(name: str) -> None:
    with pytest.raises(SettingsError, match=r"--allowed-hosts .* is no host name"):
        load_settings({"allowed_hosts": f"ok,{name}"})
