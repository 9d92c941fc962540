"""Keys from a file: which there are, and that a new file is read without losing a request."""

import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.access.keys import MAX_FILE_BYTES, KeyFileError, Keys, read_key_file
from app.cli import main
from app.settings import Settings, SettingsError, load_settings
from tests.app.running import Served, Spawn, wait_for

SECRET = "sk-never-shown"


def write(path: Path, text: str) -> Path:
    file = path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_every_line_is_a_key(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeff# for ComfyUI\nalpha\n\n  two words \r\n#off\nbéta\nalpha\n")

    assert read_key_file(file) == ("alpha", "two words", "béta")


def test_all_keys_open_the_service(tmp_path: Path) -> None:
    keys = Keys(Settings(api_key_file=write(tmp_path, "alpha\nbéta"), api_key="gamma"))

    assert all(map(keys.open, (b"alpha", "béta".encode(), b"gamma")))
    assert not any(map(keys.open, (b"", b"alph", b"alphaa", b"ALPHA", "béta".encode("latin-1"), b"alpha\nb\xc3\xa9ta")))


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


UNUSABLE = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_text(""), "has 0 keys, expected 1 to 1,000"),
    "blank": (lambda path: path.write_text(" \n\t\n# none\n"), "has 0 keys"),
    "too many": (lambda path: path.write_text("\n".join(map(str, range(1001)))), "has 1,001 keys"),
    "too large": (lambda path: path.write_text("x" * (MAX_FILE_BYTES + 1)), "is 65,537 bytes, expected at most 65,536"),
    "not text": (lambda path: path.write_bytes(SECRET.encode() + b"\xff"), "is not UTF-8"),
    "control character": (lambda path: path.write_text(f"# comment\n{SECRET}\x00"), "line 2 has a control character"),
    "folder": (Path.mkdir, "is a folder, expected a file"),
    "pipe": (make_pipe, "is a pipe, expected a file"),
    "socket": (make_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected a file"),
    "circle of links": (lambda path: path.symlink_to(path), "cannot be read"),
}


@pytest.mark.parametrize(("make", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_without_keys_ends_the_start(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    file = tmp_path / "k"
    make(file)

    with pytest.raises(KeyFileError, match=message) as caught:
        read_key_file(file)
    assert SECRET not in str(caught.value)
    with pytest.raises(SettingsError, match="--api-key-file / QWEN3_ENCODER_API_KEY_FILE: "):
        Keys(Settings(api_key_file=file))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("api_key", ""), ("api_key", " \n"), ("api_key", "a\nb"), ("api_key", "a\udcff"), ("api_key_file", " ")],
)
def test_a_key_that_is_none_ends_the_start(
    setting: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service that should ask for a key must not start without one."""
    with pytest.raises(SettingsError):
        load_settings({setting: value})
    monkeypatch.setenv(f"QWEN3_ENCODER_{setting.upper()}", value)
    assert main(["serve", "--port", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_keys_that_everybody_can_read_are_warned_of(
    tmp_path: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path, SECRET)
    file.chmod(mode)

    read_key_file(file)

    assert ("every user of this machine can read the keys" in caplog.text) is warned


def test_a_broken_file_keeps_the_keys_from_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = write(tmp_path, "old")
    keys = Keys(Settings(api_key_file=file, api_key="given"))

    file.write_text(f"{SECRET}\x00")
    keys.reload()
    assert (keys.open(b"old"), keys.open(SECRET.encode())) == (True, False)
    assert "the keys from before stay" in caplog.text

    file.write_text("new")
    keys.reload()
    assert (keys.open(b"old"), keys.open(b"new"), keys.open(b"given")) == (False, True, True)
    assert "2 keys open the service" in caplog.text
    assert SECRET not in caplog.text


@pytest.fixture
def served(tmp_path: Path, spawn: Spawn) -> Served:
    """A service in a process of its own, with the key `old` in a file."""
    return Served(spawn("serve", "--port", "0", "--api-key-file", str(write(tmp_path, "old\n"))))


def test_a_hangup_reads_the_keys_again_and_loses_no_request(served: Served, tmp_path: Path) -> None:
    """A request that was accepted with the old key is answered; the process lives."""
    with httpx.Client(base_url=served.url, timeout=60) as client:

        def status(key: str) -> int:
            return client.post(
                "/tokenize", json={"prompt": "a"}, headers={"authorization": f"Bearer {key}"}
            ).status_code

        with socket.create_connection((client.base_url.host, client.base_url.port)) as begun:
            head = "POST /tokenize HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer old"
            begun.sendall(f"{head}\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n".encode())
            wait_for(lambda: status("old") == 200)
            write(tmp_path, "new\nnewer\n")
            served.process.send_signal(signal.SIGHUP)
            wait_for(lambda: status("newer") == 200)
            begun.sendall(b'{"prompt": "a"}')

            assert begun.recv(12) == b"HTTP/1.1 200"
        assert (status("new"), status("old")) == (200, 401)
    assert served.process.poll() is None
    assert "old" not in "".join(served.lines).split()


def test_a_key_in_the_list_of_processes_is_warned_of(spawn: Spawn) -> None:
    """And one without a key on an address that others reach, too."""
    served = Served(spawn("serve", "--port", "0", "--api-key", SECRET))

    assert any("--api-key: every user of this machine can read a flag" in line for line in served.lines)
    assert not any(SECRET in line or "asks for no key" in line for line in served.lines)


def test_an_open_address_without_a_key_is_warned_of(spawn: Spawn) -> None:
    served = Served(spawn("serve", "--port", "0", "--host", "0.0.0.0"))

    assert any("0.0.0.0: whoever reaches this address can use the service" in line for line in served.lines)
    served.process.send_signal(signal.SIGHUP)
    wait_for(lambda: any("SIGHUP: there is no key file" in line for line in served.lines))
    assert served.process.poll() is None


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_a_service_ends_with_its_terminal(spawn: Spawn) -> None:
    """It would go on with nobody who sees it, and hold the memory of a model."""
    terminal, inside = os.openpty()
    process = spawn("serve", "--port", "0", stdin=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    text = b""
    while b"curl " not in text:
        text += os.read(terminal, 4096)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)  # the kernel sends it to a session that has the terminal

    assert process.wait(timeout=60) == 0
