"""The time from the command to a service that is ready, with the demo checkpoint.

python -m benchmarks.startup [--rounds 5]
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.report import Row, report
from benchmarks.service import Service

MODULE = "benchmarks.startup"
GOAL_S = 2.0


def measure(rounds: int = 5) -> list[Row]:
    """One row: seconds until GET /readyz answers 200."""
    seconds = []
    for _ in range(rounds + 1):
        with Service("demo") as service:
            seconds.append(service.startup_s)
    median = statistics.median(seconds[1:])  # the first may have to write the checkpoint
    return [Row("start to ready, demo checkpoint", MODULE, median, "s", GOAL_S, at_least=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    with report(options.output) as rows:
        rows += measure(options.rounds)


if __name__ == "__main__":
    main()
