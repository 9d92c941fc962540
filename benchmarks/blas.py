"""Matrix products of MLX on the CPU, with the reference BLAS of its wheel and with the BLAS that encoder activates.

    python benchmarks/blas.py [--rounds 5]

Each runs in a process of its own, since a BLAS once loaded stays. They take turns, so that both see the same machine.
"""

import argparse
import json
import statistics
import subprocess
import sys

SHAPES = [(32, 1024, 3072), (64, 1024, 3072), (512, 1024, 3072)]  # tokens × (D, MLP width) of Qwen3-0.6B

REFERENCE = "name = 'reference BLAS'"
ACTIVATED = """
from encoder.blas import activate
blas = activate()
name = f"{blas.name} {blas.version} ({blas.source}, {blas.threads} threads)"
"""
MEASURE = """
import json, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
gflops = []
for rows, inner, columns in SHAPES:
    x, w = mx.random.normal((rows, inner)), mx.random.normal((inner, columns))
    mx.eval(x, w, x @ w)
    started, products = time.perf_counter(), 0
    while products < 3 or time.perf_counter() - started < 0.3:
        mx.eval(x @ w)
        products += 1
    gflops.append(2e-9 * rows * inner * columns * products / (time.perf_counter() - started))
print(json.dumps([name, gflops]))
"""


def measure(choose_blas: str) -> tuple[str, list[float]]:
    """Name of the BLAS and GFLOP/s for each shape, from a fresh process."""
    code = f"{choose_blas}\nSHAPES = {SHAPES}\n{MEASURE}"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, gflops = json.loads(finished.stdout.splitlines()[-1])
    return name, gflops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes for each BLAS; the median counts")
    rounds = parser.parse_args().rounds

    pairs = [(measure(REFERENCE), measure(ACTIVATED)) for _ in range(rounds)]
    print(f"float32, GFLOP/s, median of {rounds}: reference BLAS | {pairs[0][1][0]} | ratio")
    for index, (rows, inner, columns) in enumerate(SHAPES):
        before = statistics.median(reference[1][index] for reference, _ in pairs)
        after = statistics.median(activated[1][index] for _, activated in pairs)
        print(f"{rows:4} × {inner} @ {inner} × {columns}: {before:6.1f} | {after:6.1f} | {after / before:5.1f}")


if __name__ == "__main__":
    main()
