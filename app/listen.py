"""The socket to listen on, and how to reach it."""

import contextlib
import errno
import os
import shlex
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from app.settings import Settings, SettingsError, variable

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # a socket bound to every address, and the loopback address for it


@contextlib.contextmanager
def listening_socket(settings: Settings) -> Iterator[socket.socket]:
    """A socket bound to the address of the settings. At the end it is closed, and a Unix socket's file removed.

    Errors: SettingsError, saying what is wrong with the address.
    """
    sock = _bind(settings.host, settings.port) if settings.uds is None else _bind_unix(settings.uds)
    try:
        yield sock
    finally:
        sock.close()
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        # So that a restart need not wait for old connections to time out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(
            f"cannot listen on {host} port {port}: {reason}. Choose others with --host and --port."
        ) from error
    return sock


def _bind_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale(path):
            path.unlink()
        sock.bind(os.fspath(path))
    except OSError as error:
        sock.close()
        raise SettingsError(
            f"cannot listen on {path}: {error.strerror or error}. Choose another with --uds."
        ) from error
    return sock


def _is_stale(path: Path) -> bool:
    """Whether `path` is a socket that an earlier server left behind and no process listens on."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a busy server's backlog may be full, then connecting would wait
        return probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED


def curl_line(settings: Settings, sock: socket.socket) -> str:
    """A curl command to paste into a shell on this machine."""
    key = ""
    if settings.api_key is not None:
        key = f' -H "authorization: Bearer ${variable("api_key")}"'
    elif settings.api_key_file is not None:  # a key of the file, without its comments
        key = f""" -H "authorization: Bearer $(grep -m 1 '^[^#]' {shlex.quote(str(settings.api_key_file))})\""""
    headers = f"{key} -H 'content-type: application/json' -H 'accept: application/json'"
    return f'curl {_target(settings, sock)}/encode{headers} -d \'{{"prompt": "a cat"}}\''


def _target(settings: Settings, sock: socket.socket) -> str:
    if settings.uds is not None:
        return f"--unix-socket '{settings.uds}' http://localhost"
    host, port = sock.getsockname()[:2]
    host = ANY.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
