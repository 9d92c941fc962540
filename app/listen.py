"""The socket to listen on, and how to reach it."""

import contextlib
import ctypes
import errno
import os
import shlex
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from app.settings import Settings, SettingsError, variable

SO_ATTACH_FILTER = 26  # asm-generic/socket.h
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # a socket bound to every address, and the loopback address for it


@contextlib.contextmanager
def listening_socket(settings: Settings) -> Iterator[socket.socket]:
    """A socket bound to the address of the settings. At the end it is closed, and a Unix socket's file removed.

    Errors: SettingsError, saying what is wrong with the address.
    """
    if settings.uds is None:
        with _bind(settings.host, settings.port) as sock:
            yield sock
        return
    with _bind_unix(settings.uds) as sock:
        made = settings.uds.stat().st_ino
        try:
            yield sock
        finally:
            with contextlib.suppress(FileNotFoundError):
                if settings.uds.stat().st_ino == made:  # else it belongs to the process that takes this one's place
                    settings.uds.unlink()


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


def refuse_connections(sock: socket.socket) -> None:
    """Let in no further connection. Those that clients have made can still be accepted.

    Closing the socket would reset them, and refusing new ones only then would reset what comes in between. On Linux a
    filter drops the packets that open a connection (socket(7), SO_ATTACH_FILTER); elsewhere nothing happens.
    """
    with contextlib.suppress(OSError):
        if sock.family == socket.AF_UNIX:
            os.unlink(sock.getsockname())
        elif sys.platform == "linux":
            drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K: keep 0 bytes
            program = struct.pack("HP", 1, ctypes.addressof(drop))  # struct sock_fprog
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


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
