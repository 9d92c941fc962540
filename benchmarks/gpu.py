"""The forward pass on a GPU, beside PyTorch's and beside the card's limits, and the service with it.

    make bench-gpu
    python -m benchmarks.gpu [--rounds 10] [--output benchmarks/results/gpu.json]

All sides have the dims of Qwen3-4B, random bfloat16 weights and the same tokens. Each has a process of its own; they
take turns of a few passes on one card. A pass ends when the output of the wanted layer is in the card's memory.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import overhead, throughput
from benchmarks.checkpoints import read_prompts, write_tokenizer
from benchmarks.loading import CONFIG, write_checkpoint
from benchmarks.report import Row, report

LOADERS: dict[str, Callable[[Path], "Side"]] = {
    "ours": lambda folder: load_encoder(folder, plain=False),
    "plain": lambda folder: load_encoder(folder, plain=True),
    "torch": lambda folder: load_torch(folder, compiled=False),
    "torch.compile": lambda folder: load_torch(folder, compiled=True),
}
LAYERS = 35
PASSES = 6  # in one turn
REQUESTS = 1024  # of many clients at once
MATRIX_NUMBERS = 2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728)  # of one layer
ROW = 30  # of the first prompt, by which the sides are compared
TOLERANCE = 0.1  # of the size of a result: what sides may differ by after 35 layers in bfloat16


@dataclass(frozen=True)
class Case:
    """Prompts of one length, padded up to `rows` with rows that attention sees.

    Attributes:
        max_ms: the goal for one pass.
        min_percent: the goal as a share of the card's rate of bfloat16 products.
    """

    what: str
    prompts: int
    tokens: int
    rows: int
    layers: int
    max_ms: float | None = None
    min_percent: float | None = None

    @property
    def products(self) -> float:
        """Floating-point operations of the linear layers."""
        return 2.0 * self.prompts * self.rows * MATRIX_NUMBERS * self.layers

    def sides(self, sides: Sequence[str]) -> list[str]:
        """The sides that take part. PyTorch needs minutes to compile, and batches gain little from it."""
        return [side for side in sides if side != "torch.compile" or self.prompts == 1]

    def limit_ms(self, limits: dict[str, float]) -> float:
        """The larger of two bounds: the products at the card's rate, and reading the weights at its copying rate."""
        weights = 2 * MATRIX_NUMBERS * self.layers
        return 1e3 * max(self.products / limits["products/s"], weights / limits["bytes/s"])


CASES = (
    Case("klein, 1×512 rows, 40 of them tokens", 1, 40, 512, 27, max_ms=7),
    Case("z-image, 1×64 tokens", 1, 64, 64, 35, max_ms=5),
    Case("z-image, 32×64 tokens", 32, 64, 64, 35, min_percent=65),
    Case("klein, 8×512 tokens", 8, 512, 512, 27, min_percent=65),
)
Numbers = NDArray[np.float32]
Side = tuple[Callable[[Case], Any], Callable[[Any], Numbers]]  # a pass, and a row of its result on the host


def token_ids(case: Case) -> list[list[int]]:
    """The same for all sides."""
    return np.random.default_rng(case.rows).integers(0, CONFIG["vocab_size"], (case.prompts, case.tokens)).tolist()


def load_encoder(folder: Path, plain: bool) -> Side:
    """Our encoder with the forward pass that TextEncoder chooses, or with the plain one."""
    import encoder  # noqa: I001  # must come before mlx.core: it decides how MLX uses the GPU

    import mlx.core as mx

    from encoder.checkpoint import load_weights
    from encoder.qwen3.plain import PlainForward
    from encoder.serving.model_thread import MLX_CACHE_BYTES
    from encoder.qwen3.model import Qwen3
    from encoder.types import Job, Tap

    mx.set_cache_limit(MLX_CACHE_BYTES["gpu"])
    if plain:
        checkpoint = encoder.open_checkpoint(encoder.ModelOptions(str(folder)))
        model = Qwen3(checkpoint.config)
        load_weights(checkpoint, model, mx.bfloat16)
        forward: Any = PlainForward(model)
    else:
        forward = encoder.TextEncoder.open(encoder.ModelOptions(str(folder))).forward

    def run(case: Case) -> Any:
        tap = Tap(case.layers, normed=True)
        jobs = [
            Job(tuple(ids), case.rows, case.rows, dropped_rows=0, taps=(tap,), combine="concat", dtype="bfloat16")
            for ids in token_ids(case)
        ]
        rows = forward(jobs, [tap])[tap]
        mx.eval(rows)
        return rows

    return run, lambda rows: np.array(rows[0][ROW].astype(mx.float32))


def load_torch(folder: Path, compiled: bool) -> Side:
    """transformers' model with its sdpa attention and masked padding."""
    import torch
    import transformers

    torch._dynamo.config.cache_size_limit = 4 * len(CASES)
    model = transformers.Qwen3Model.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.cuda().eval()
    forward = torch.compile(model, dynamic=False) if compiled else model

    def run(case: Case) -> Any:
        model.config.num_hidden_layers = case.layers
        input_ids = torch.zeros(case.prompts, case.rows, dtype=torch.long)
        input_ids[:, : case.tokens] = torch.tensor(token_ids(case))
        mask = (torch.arange(case.rows) < case.tokens).long().expand_as(input_ids)
        with torch.inference_mode():
            out = forward(
                input_ids=input_ids.cuda(),
                attention_mask=mask.cuda() if case.tokens < case.rows else None,
                use_cache=False,
            ).last_hidden_state
        torch.cuda.synchronize()
        return out

    return run, lambda out: out[0, ROW].float().cpu().numpy()


def measure_limits() -> dict[str, float]:
    """The card's rates: FLOP/s in products of 8192 × 8192 bfloat16 matrices; bytes/s of a copy, read and written."""
    import torch

    def seconds(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(12):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 5e3)
        return min(taken[2:])

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return {
        "products/s": 2 * 8192**3 / seconds(lambda: a @ b),
        "bytes/s": 2 * source.nbytes / seconds(lambda: target.copy_(source)),
    }


def work(side: str, folder: Path, connection: Connection) -> None:
    """Answer each case with the seconds of its passes and a row of the last result; None ends the process."""
    run, numbers = LOADERS[side](folder)
    connection.send("ready")
    while case := connection.recv():
        seconds = []
        for _ in range(PASSES):
            started = time.perf_counter()
            result = run(case)
            seconds.append(time.perf_counter() - started)
        # Another side has just used the card and its caches, so the first pass does not count.
        connection.send((seconds[1:], numbers(result)))


def measure(folder: Path, sides: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by case and side; all sides take turns in every round.

    Errors: SystemExit where sides differ by more than rounding: then their times say nothing.
    """
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in sides:
        pipes[side], theirs = context.Pipe()
        context.Process(target=work, args=(side, folder, theirs), daemon=True).start()
        theirs.close()
        pipes[side].recv()
        print(f"{side} is loaded", file=sys.stderr)

    def ask(side: str, case: Case) -> tuple[list[float], Numbers]:
        pipes[side].send(case)
        answer: tuple[list[float], Numbers] = pipes[side].recv()
        return answer

    seconds: dict[str, dict[str, list[float]]] = {case.what: {side: [] for side in case.sides(sides)} for case in CASES}
    for case in CASES:
        rows = {side: ask(side, case)[1] for side in case.sides(sides)}
        first = next(iter(rows.values()))
        errors = {side: float(np.linalg.norm(row - first) / np.linalg.norm(first)) for side, row in rows.items()}
        print(f"{case.what}: warm, and differing from {next(iter(rows))} by {errors}", file=sys.stderr)
        if not max(errors.values()) < TOLERANCE:
            raise SystemExit(f"{case.what}: the sides differ.")
    for _ in range(rounds):
        for case in CASES:
            for side, taken in seconds[case.what].items():
                taken += ask(side, case)[0]
    for pipe in pipes.values():
        pipe.send(None)
    return {what: {side: 1e3 * statistics.median(t) for side, t in row.items()} for what, row in seconds.items()}


def row_of(case: Case, medians: dict[str, float], limits: dict[str, float]) -> Row:
    """The row of a case: times beside the goal in milliseconds or as a share of the card's rate."""
    what, known = f"forward on a GPU, {case.what}", medians | {"limit": case.limit_ms(limits)}
    if case.max_ms is not None:
        return Row(what, "benchmarks.gpu", medians["ours"], "ms", case.max_ms, False, known, "ms")
    rate = case.products / limits["products/s"] * 1e3 / medians["ours"]
    return Row(what, "benchmarks.gpu", 100 * rate, "% of the rate", case.min_percent, True, known, "ms")


def card() -> str:
    """The GPU's name."""
    import torch

    return str(torch.cuda.get_device_name())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sides", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    with get_context("spawn").Pool(1) as pool:
        limits, device = pool.apply(measure_limits), pool.apply(card)
    with report(arguments.output, device) as rows, tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), LAYERS)
        medians = measure(Path(folder), arguments.sides, arguments.rounds)
        print(f"products {limits['products/s'] / 1e12:.0f} TFLOP/s, copies {limits['bytes/s'] / 1e12:.2f} TB/s")
        rows += [row_of(case, medians[case.what], limits) for case in CASES]
        write_tokenizer(Path(folder), read_prompts())
        rows += overhead.measure(model=Path(folder))
        rows += throughput.measure(REQUESTS, model=Path(folder))


if __name__ == "__main__":
    main()
