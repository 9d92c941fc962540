"""Matrix products of MLX on the CPU, with the reference BLAS of its wheel and with what encoder activates.

    python -m benchmarks.blas [--rounds 2]

Each BLAS has a process of its own, since a loaded BLAS cannot be exchanged. They take turns, so that both meet the same
conditions.
"""

import argparse
import math
from pathlib import Path

from benchmarks.report import Row, report
from benchmarks.workers import Case, Result, Worker, answer_requests, take_turns

MODULE = "benchmarks.blas"
SHAPES = [(32, 1024, 3072), (64, 1024, 3072), (512, 1024, 3072)]  # tokens × (D, MLP width) of Qwen3-0.6B
PRODUCTS = 3  # in a request
SIDES = ("OpenBLAS", "reference BLAS")


def measure(rounds: int = 2) -> list[Row]:
    """A row for each shape, in GFLOP/s."""
    cases = [Case(" × ".join(map(str, shape)), shape, SIDES) for shape in SHAPES]
    with Worker(MODULE, "--work", SIDES[0]) as ours, Worker(MODULE, "--work", SIDES[1]) as reference:
        seconds = take_turns({SIDES[0]: ours, SIDES[1]: reference}, cases, rounds)
    rows = []
    for case in cases:
        flops = 2e-9 * math.prod(case.request) * PRODUCTS
        gflops = {side: flops / taken for side, taken in seconds[case.name].items()}
        what = f"matrix product {case.name}, float32: OpenBLAS over MLX's own reference BLAS"
        ratio = gflops[SIDES[0]] / gflops[SIDES[1]]
        rows.append(Row(what, MODULE, ratio, medians=gflops, medians_unit="GFLOP/s"))
    return rows


def work(side: str) -> None:
    """Answer each shape with the time of a few products."""
    if side == "OpenBLAS":
        import encoder  # isort: skip  # noqa: F401  # loads OpenBLAS; must come before mlx.core
    import mlx.core as mx

    mx.set_default_device(mx.cpu)

    def run(shape: tuple[int, int, int]) -> Result:
        rows, inner, columns = shape
        x, w = mx.ones((rows, inner)), mx.ones((inner, columns))
        for _ in range(PRODUCTS):
            mx.eval(x @ w)
        return None

    answer_requests(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--work", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    with report(options.output) as rows:
        rows += measure(options.rounds)


if __name__ == "__main__":
    main()
