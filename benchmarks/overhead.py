"""What the service adds to the encoder: POST /encode minus the forward pass, and replies from the cache.

    python -m benchmarks.overhead [--requests 100]

A checkpoint as wide as Qwen3-4B and three thin layers deep, so that replies are as large as there and passes short. One
client, one request after the other, by TCP on loopback and by a Unix socket in turn. The forward pass is what the
service says in x-inference-time. The client reads the whole reply and does not look into it.
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

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
BASE_MS, BYTES_PER_MS = 1.5, 4e6  # what may be added: this, and the reply at 4 GB/s
CACHED_MS = 4.0
WARM_UP = 10
CASES = {"z-image": "z-image", "flux2-klein": "klein"}  # preset of the service by the name that it stands for


def measure(requests: int = 100) -> list[Row]:
    """The rows of what the service adds."""
    prompt = max(read_prompts(), key=len)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        (folder / "presets.toml").write_text(KLEIN)
        write_checkpoint(folder, DIMS, LAYERS)
        connections = {
            name: stack.enter_context(Service(folder, uds, presets=folder / "presets.toml")).connect()
            for name, uds in (("TCP on loopback", None), ("a Unix socket", folder / "socket"))
        }
        rows = []
        for name, preset in CASES.items():
            fields = {"prompt": prompt, "preset": preset}
            computed = _replies(connections, fields, NO_STORE, requests)
            rows += [_added(name, way, replies) for way, replies in computed.items()]
            cached = _replies(connections, fields, {}, requests)
            rows += [_from_cache(name, way, replies) for way, replies in cached.items()]
    return rows


def _replies(
    connections: dict[str, Connection], fields: dict[str, str], headers: dict[str, str], requests: int
) -> dict[str, list[Reply]]:
    """By connection, without those that warm up; the connections take turns."""
    taken: dict[str, list[Reply]] = {name: [] for name in connections}
    for name, connection in [*connections.items()] * (requests + WARM_UP):
        taken[name].append(connection.post("/encode", fields, headers)._replace(body=b""))
    return {name: replies[WARM_UP:] for name, replies in taken.items()}


def _added(preset: str, way: str, replies: list[Reply]) -> Row:
    size = _size(replies)
    return Row(
        f"POST /encode {preset}, {size / 1e6:.1f} MB by {way}: what the service adds to the forward pass",
        MODULE,
        statistics.median(reply.ms - reply.inference_ms for reply in replies),
        "ms",
        goal=round(BASE_MS + size / BYTES_PER_MS, 2),
        at_least=False,
        medians=_medians(replies),
        medians_unit="ms",
    )


def _from_cache(preset: str, way: str, replies: list[Reply]) -> Row:
    if any(reply.headers["x-cache"] != "hit" for reply in replies):
        raise SystemExit("A prompt seen before was not answered from the cache.")
    return Row(
        f"POST /encode {preset}, {_size(replies) / 1e6:.1f} MB by {way}: a prompt seen before",
        MODULE,
        statistics.median(reply.ms for reply in replies),
        "ms",
        goal=CACHED_MS,
        at_least=False,
    )


def _size(replies: list[Reply]) -> int:
    return int(replies[0].headers["content-length"])


def _medians(replies: list[Reply]) -> dict[str, float]:
    names = ("tokenization", "queue", "inference")
    parts = {name: statistics.median(float(reply.headers[f"x-{name}-time"]) for reply in replies) for name in names}
    return {"whole": statistics.median(reply.ms for reply in replies), **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100, help="of each kind")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    with report(options.output) as rows:
        rows += measure(options.requests)


if __name__ == "__main__":
    main()
