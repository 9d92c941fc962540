"""Whose socket is taken over: one that a dead server left behind, and no other."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.listen import listening_socket
from app.settings import Settings, SettingsError


@contextlib.contextmanager
def bound(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    """Another process's socket at this path."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
        yield sock


def assert_refused(path: Path) -> None:
    inode = path.stat().st_ino
    with pytest.raises(SettingsError, match="--uds"), listening_socket(Settings(uds=path)):
        pass
    assert path.stat().st_ino == inode


def test_a_socket_that_a_dead_server_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "encoder.sock"
    with bound(path):
        pass

    with listening_socket(Settings(uds=path)) as sock:
        assert sock.getsockname() == str(path)


def test_a_live_socket_is_left_to_its_server(tmp_path: Path) -> None:
    path = tmp_path / "encoder.sock"
    with bound(path) as other:
        other.listen()

        assert_refused(path)

        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_a_live_socket_that_takes_no_more_connections_is_left_to_its_server(tmp_path: Path) -> None:
    """A server that is too busy to accept is no dead one; to wait for it would hold up the start."""
    path = tmp_path / "encoder.sock"
    with bound(path) as other, contextlib.ExitStack() as waiting:
        other.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))

        assert_refused(path)


def test_a_socket_of_another_kind_is_left_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with bound(path, socket.SOCK_DGRAM):
        assert_refused(path)
