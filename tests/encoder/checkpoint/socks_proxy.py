"""A SOCKS5 proxy on loopback, without authentication. Source: RFC 1928."""

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

IPV4, NAME = 1, 3  # types of an address


class SocksProxy(ThreadingTCPServer):
    """Connects to what it is asked for.

    Attributes:
        connected: the ports that it has connected to, in order.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.connected: list[int] = []

    @property
    def url(self) -> str:
        return f"socks5://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_proxy() -> Iterator[SocksProxy]:
    with SocksProxy() as proxy:
        thread = Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Handler(StreamRequestHandler):
    server: SocksProxy
    rbufsize = 0  # so that nothing is read ahead of `select`

    def handle(self) -> None:
        _, num_methods = self.rfile.read(2)
        self.rfile.read(num_methods)
        self.wfile.write(b"\x05\x00")  # no authentication
        _, _, _, kind = self.rfile.read(4)
        size = {IPV4: 4, NAME: 0}[kind] or self.rfile.read(1)[0]
        address = self.rfile.read(size)
        host = socket.inet_ntoa(address) if kind == IPV4 else address.decode()
        port = int.from_bytes(self.rfile.read(2), "big")
        with socket.create_connection((host, port)) as target:
            self.server.connected.append(port)
            self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
            self._relay(target)

    def _relay(self, target: socket.socket) -> None:
        other = {self.connection: target, target: self.connection}
        while True:
            for readable in select.select(list(other), [], [])[0]:
                data = readable.recv(65536)
                if not data:
                    return
                other[readable].sendall(data)
