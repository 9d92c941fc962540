"""Memory of the service over many mixed requests: the demo checkpoint, a small cache that is soon full.

    make bench-soak                                       20,000 requests, as long as the demo takes for them
    python -m benchmarks.soak [--requests 2000]

During the first fifth, threads, MLX's buffers and the cache grow to their bounds. After it, resident memory is read ten
times; growth is the largest of these values relative to the one at the end of the first fifth.
"""

import argparse
from pathlib import Path

from benchmarks.checkpoints import read_prompts
from benchmarks.mixed import CLIENTS, mixed_requests, send_all
from benchmarks.report import Row, report
from benchmarks.service import Service

MODULE = "benchmarks.soak"
CACHE_BYTES = 2**20
READINGS = 10
GROWTH_PERCENT = 2.0


def measure(requests: int = 2000, clients: int = CLIENTS) -> list[Row]:
    """One row: growth after the warm-up, and the megabytes at each reading."""
    asked = mixed_requests(read_prompts(), requests)
    warm_up, rest = asked[: requests // 5], asked[requests // 5 :]
    with Service("demo", cache_bytes=CACHE_BYTES) as service:
        send_all(service, warm_up, clients, use_cache=True)
        megabytes = {f"after {len(warm_up):,}": service.memory_bytes() / 1e6}
        for reading in range(1, READINGS + 1):
            done, now = ((reading - 1) * len(rest) // READINGS, reading * len(rest) // READINGS)
            send_all(service, rest[done:now], clients, use_cache=True)
            megabytes[f"{len(warm_up) + now:,}"] = service.memory_bytes() / 1e6
    first, *later = megabytes.values()
    growth = 100 * (max(later) / first - 1)
    what = f"memory after {requests:,} mixed requests of {clients} clients: growth after the first fifth"
    return [Row(what, MODULE, growth, "%", GROWTH_PERCENT, at_least=False, medians=megabytes, medians_unit="MB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    with report(options.output) as rows:
        rows += measure(options.requests, options.clients)


if __name__ == "__main__":
    main()
