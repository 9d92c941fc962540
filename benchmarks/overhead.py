"""What the service adds to the encoder: POST /encode minus the forward pass, and replies from the cache.

    python -m benchmarks.overhead [--requests 100] [--model FOLDER]

Unless a model is given, the checkpoint is as wide as Qwen3-4B and has three thin layers: replies have Qwen3-4B's size,
and passes are short. One client sends one request after the other, over TCP on loopback and over a Unix socket in turn.
The time of the forward pass is the reply's x-inference-time. The client reads the whole reply and does not parse it.
`bare` is the lower bound: the same number of bytes from a process that does nothing else, over the same connection and
in the same turns.
"""

import argparse
import multiprocessing
import socket
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.checkpoints import QWEN3_4B, read_prompts, write_checkpoint
from benchmarks.report import Row, report
from benchmarks.service import NO_STORE, Connection, Reply, Service

MODULE = "benchmarks.overhead"
DIMS = replace(QWEN3_4B, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)
LAYERS = 3
KLEIN = """[klein]
base = "flux2-klein"
layers = [0, 1, 2]
"""
BASE_MS, BYTES_PER_MS = 1.5, 4e6  # the goal: 1.5 ms, and the time of the reply at 4 GB/s
CACHED_MS = 4.0
WARM_UP = 10
THIN = {"z-image": "z-image", "flux2-klein": "klein"}  # the service's preset, by the name in the table
WHOLE = {"z-image": "z-image", "flux2-klein": "flux2-klein"}


def measure(requests: int = 100, model: Path | None = None) -> list[Row]:
    """The rows of what the service adds; `model` replaces the thin checkpoint."""
    prompt = max(read_prompts(), key=len)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        (folder / "presets.toml").write_text(KLEIN)
        if model is None:
            write_checkpoint(folder, DIMS, LAYERS)
        services = {
            name: (
                stack.enter_context(Service(model or folder, uds, presets=folder / "presets.toml")).connect(),
                stack.enter_context(bare_server(folder / "bare" if uds else None)),
            )
            for name, uds in (("TCP on loopback", None), ("a Unix socket", folder / "socket"))
        }
        rows = []
        for name, preset in (THIN if model is None else WHOLE).items():
            fields = {"prompt": prompt, "preset": preset}
            computed = _take(services, fields, NO_STORE, requests)
            rows += [_added(name, way, taken) for way, taken in computed.items()]
            cached = _take(services, fields, {}, requests)
            rows += [_from_cache(name, way, taken) for way, taken in cached.items()]
    return rows


@contextmanager
def bare_server(uds: Path | None) -> Iterator[Connection]:
    """A connection to a process that answers `POST /<n>` with n bytes that it has prepared."""
    with socket.socket(socket.AF_UNIX if uds else socket.AF_INET) as listening:
        listening.bind(str(uds) if uds else ("127.0.0.1", 0))
        listening.listen()
        process = multiprocessing.Process(target=_serve_bytes, args=[listening], daemon=True)
        process.start()
        yield Connection(uds or listening.getsockname()[1])
        process.terminate()
        process.join()


def _serve_bytes(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    body = b""
    while request := connection.recv(65_536):
        size = int(request.split()[1][1:])
        body = body if len(body) == size else b"x" * size
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        connection.sendall(body)


class Taken(NamedTuple):
    """The replies over one kind of connection, without those of the warm-up."""

    replies: list[Reply]
    bare: list[Reply]

    @property
    def size(self) -> int:
        """Bytes of a reply's body."""
        return int(self.replies[0].headers["content-length"])

    def medians(self, *names: str) -> dict[str, float]:
        """Medians in ms: the whole request, the stages that the service reports, and the bare transfer."""
        own = {name: _median(float(reply.headers[f"x-{name}-time"]) for reply in self.replies) for name in names}
        whole, bare = (_median(reply.ms for reply in replies) for replies in (self.replies, self.bare))
        return {"whole": whole, **own, "bare": bare}


def _take(
    services: dict[str, tuple[Connection, Connection]], fields: dict[str, str], headers: dict[str, str], requests: int
) -> dict[str, Taken]:
    """Send the requests over each kind of connection in turn. Without the cache, each has a prompt of its own."""
    taken = {way: Taken([], []) for way in services}
    for number in range(requests + WARM_UP):
        sent = fields | ({"prompt": f"{fields['prompt']} {number:04d}"} if headers else {})
        for way, (service, bare) in services.items():
            reply = service.post("/encode", sent, headers)._replace(body=b"")
            transfer = bare.post(f"/{reply.headers['content-length']}", {})._replace(body=b"")
            if number >= WARM_UP:
                taken[way].replies.append(reply)
                taken[way].bare.append(transfer)
    return taken


def _added(preset: str, way: str, taken: Taken) -> Row:
    size = taken.size
    return Row(
        f"POST /encode {preset}, {size / 1e6:.1f} MB by {way}: what the service adds to the forward pass",
        MODULE,
        _median(reply.ms - reply.inference_ms for reply in taken.replies),
        "ms",
        goal=round(BASE_MS + size / BYTES_PER_MS, 2),
        at_least=False,
        medians=taken.medians("tokenization", "queue", "inference"),
        medians_unit="ms",
    )


def _from_cache(preset: str, way: str, taken: Taken) -> Row:
    if any(reply.headers["x-cache"] != "hit" for reply in taken.replies):
        raise SystemExit("A prompt seen before was not answered from the cache.")
    return Row(
        f"POST /encode {preset}, {taken.size / 1e6:.1f} MB by {way}: a prompt seen before",
        MODULE,
        _median(reply.ms for reply in taken.replies),
        "ms",
        goal=CACHED_MS,
        at_least=False,
        medians=taken.medians(),
        medians_unit="ms",
    )


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100, help="of each kind")
    parser.add_argument("--model", type=Path, help="a folder with all layers of Qwen3-4B")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    with report(options.output) as rows:
        rows += measure(options.requests, options.model)


if __name__ == "__main__":
    main()
