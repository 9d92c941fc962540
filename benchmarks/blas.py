"""Matrix products of MLX on the CPU, with the reference BLAS of its wheel and with what encoder activates.

    python benchmarks/blas.py [--rounds 5]

Each runs in a process of its own, since a BLAS once loaded stays. They take turns, so that both see the same machine.
"""

import argparse
import json
import os
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


def measure(choose_blas: str, **environment: str) -> tuple[str, list[float]]:
    """Name of the BLAS and GFLOP/s for each shape, from a fresh process."""
    code = f"{choose_blas}\nSHAPES = {SHAPES}\n{MEASURE}"
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    name, gflops = json.loads(finished.stdout.splitlines()[-1])
    return name, gflops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes for each BLAS; the median counts")
    rounds = parser.parse_args().rounds

    runs: dict[str, list[list[float]]] = {}
    for _ in range(rounds):
        for name, gflops in measure(REFERENCE), measure(ACTIVATED, OPENBLAS_NUM_THREADS="1"), measure(ACTIVATED):
            runs.setdefault(name, []).append(gflops)

    print(f"float32, GFLOP/s, median of {rounds}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    print("".join(f"{rows:8}" for rows, _, _ in SHAPES), " tokens")
    for name, results in runs.items():
        print("".join(f"{statistics.median(shape):8.1f}" for shape in zip(*results, strict=True)), "", name)


if __name__ == "__main__":
    main()
