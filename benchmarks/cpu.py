"""All figures that need no GPU, in about ten minutes on two CPUs; `make bench` runs this.

    python -m benchmarks.cpu [--output benchmarks/results/cpu.json]

To fit into that time, it measures five rounds of the forward pass, four prompts beside diffusers, one prompt beside
mflux, mflux without OpenBLAS once and on three layers, and the throughput of many clients at half of Qwen3-0.6B's
width. `make bench-soak` measures the memory over 20,000 requests.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import beside_mflux, blas, forward, overhead, pipelines, startup, throughput
from benchmarks.report import RESULTS, Row, report

SUBJECTS: dict[str, Callable[[], list[Row]]] = {
    "forward": forward.measure,
    "pipelines": pipelines.measure,
    "beside_mflux": beside_mflux.measure,
    "overhead": overhead.measure,
    "throughput": throughput.measure,
    "startup": startup.measure,
    "blas": blas.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json", help="a JSON file")
    options = parser.parse_args()
    with report(options.output) as rows:
        for name, measure in SUBJECTS.items():
            started = time.perf_counter()
            rows += measure()
            print(f"{name} took {time.perf_counter() - started:.0f} s", flush=True)
    for row in rows:
        if not row.reached:
            print(f"missed: {row.what}: {row.result:.3g} {row.unit}, goal {row.goal:g}")


if __name__ == "__main__":
    main()
