"""The forward pass on a CPU beside transformers' on PyTorch: same weights, same tokens, one process each, in turn.

    python -m benchmarks.forward [--rounds 5] [--threads 2] [--layers 28] [--lengths 19 21 23] [--plain]

Dims of Qwen3-0.6B in float32, random weights. PyTorch gets a right-padded batch with its mask, in inference mode; the
encoder gets the prompts as they are. `without kernels` is the encoder where nothing was compiled: the plain pass over a
BLAS. `products` are the matrix products of the linear layers alone, of the same sizes, by the compiled kernels.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints import QWEN3_0_6B, write_checkpoint
from benchmarks.report import Row, compare, report
from benchmarks.workers import Case, Worker, answer_requests, take_turns

MODULE = "benchmarks.forward"
CASES: dict[str, tuple[list[int], float]] = {  # tokens of each sequence, and the ratio to reach
    "1 × 12": ([12], 1.95),
    "1 × 28": ([28], 1.65),
    "1 × 44": ([44], 1.5),
    "1 × 77": ([77], 1.35),
    "1 × 512": ([512], 1.3),
    "8 × 64": ([64] * 8, 1.3),
    "18, 25, 31, 40, 52, 77, 90, 120": ([18, 25, 31, 40, 52, 77, 90, 120], 2.4),
}
SHORT = 128  # tokens; up to here the pass without kernels is measured too
LIMIT = "1 × 512"  # the case that is held against its matrix products
SIZE, INNER = QWEN3_0_6B.hidden_size, QWEN3_0_6B.intermediate_size
WIDTH = QWEN3_0_6B.num_attention_heads * QWEN3_0_6B.head_dim
KV_WIDTH = QWEN3_0_6B.num_key_value_heads * QWEN3_0_6B.head_dim
WITHOUT_KERNELS, PRODUCTS = "without kernels", "products"
Run = Callable[[Sequence[int]], NDArray[Any] | None]


def measure(
    rounds: int = 5, layers: int = 28, threads: int = 0, lengths: Sequence[int] = (), plain: bool = False
) -> list[Row]:
    """The rows of the forward pass.

    Args:
        threads: 0 means one for each CPU.
        lengths: single sequences to measure in place of the usual cases.
        plain: whether to time encoder/qwen3/model.py too.
    """
    cases = _cases(lengths, plain)
    sides = sorted({side for case in cases for side in case.sides})
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_checkpoint(Path(folder), QWEN3_0_6B, layers)
        options = ["--folder", folder, "--layers", str(layers), "--threads", str(threads or _cpus())]
        workers = {side: stack.enter_context(Worker(MODULE, "--work", side, *options)) for side in sides}
        seconds = take_turns(workers, cases, rounds)
    return [row for case in cases for row in _rows(case, seconds[case.name])]


def _cases(lengths: Sequence[int], plain: bool) -> list[Case]:
    wanted = {f"1 × {length}": [length] for length in lengths} or {name: case[0] for name, case in CASES.items()}
    return [
        Case(
            name,
            sequences,
            ["ours", "torch"]
            + [WITHOUT_KERNELS] * (sum(sequences) < SHORT)
            + [PRODUCTS] * (name == LIMIT)
            + ["plain"] * plain,
        )
        for name, sequences in wanted.items()
    ]


def _rows(case: Case, seconds: dict[str, float]) -> list[Row]:
    goal = CASES[case.name][1] if case.name in CASES else None
    named = f"forward, {case.name} tokens, float32"
    main = {side: taken for side, taken in seconds.items() if side in ("ours", "torch", "plain")}
    rows = [compare(f"{named}: transformers on PyTorch over ours", MODULE, main, goal)]
    if WITHOUT_KERNELS in seconds:
        pair = {name: seconds[name] for name in (WITHOUT_KERNELS, "torch")}
        rows.append(compare(f"{named}: the same, ours where nothing was compiled", MODULE, pair))
    if PRODUCTS in seconds:
        pair = {name: seconds[name] for name in ("ours", PRODUCTS)}
        share = 100 * seconds[PRODUCTS] / seconds["ours"]
        rows.append(Row(f"{named}: its matrix products alone, over the pass", MODULE, share, "%", medians=pair))
    return rows


def token_ids(length: int) -> list[int]:
    """The same for all sides."""
    return list(np.random.default_rng(length).integers(0, QWEN3_0_6B.vocab_size, length).tolist())


def load_torch(folder: Path, threads: int) -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()

    def run(lengths: Sequence[int]) -> NDArray[Any]:
        input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in zip(input_ids, lengths, strict=True):
            row[:length] = torch.tensor(token_ids(length))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        with torch.inference_mode():
            hidden = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return np.asarray(hidden[mask].numpy())

    return run


def load_encoder(folder: Path, threads: int, *, kernels: bool = True, plain: bool = False) -> Run:
    import encoder  # isort: skip  # noqa: F401  # puts a fast BLAS under MLX, which must not be imported before
    import mlx.core as mx

    from encoder.checkpoint import load_weights, open_checkpoint
    from encoder.options import ModelOptions
    from encoder.qwen3.cpu.forward import CpuForward
    from encoder.qwen3.cpu.kernels import library
    from encoder.qwen3.forward import Forward, choose_forward, widens_bfloat16
    from encoder.qwen3.model import Qwen3
    from encoder.qwen3.plain import PlainForward
    from encoder.types import Job, Tap

    if not kernels:
        library.FOLDER = folder  # where no library is

    checkpoint = open_checkpoint(ModelOptions(str(folder)))
    model = Qwen3(checkpoint.config)
    keep_bfloat16 = not plain and widens_bfloat16(checkpoint.config)
    load_weights(checkpoint, model, mx.float32, keep_bfloat16=keep_bfloat16)
    forward: Forward = PlainForward(model) if plain else choose_forward(model, mx.float32)
    if isinstance(forward, CpuForward):
        forward.threads = threads
    tap = Tap(checkpoint.config.num_hidden_layers, normed=True)

    def run(lengths: Sequence[int]) -> NDArray[Any]:
        jobs = [
            Job(tuple(token_ids(n)), n, n, dropped_rows=0, taps=(tap,), combine="concat", dtype="float32")
            for n in lengths
        ]
        rows = list(forward(jobs, [tap])[tap])
        mx.eval(rows)
        return np.concatenate([np.array(row[:n]) for row, n in zip(rows, lengths, strict=True)])

    return run


def load_products(layers: int, threads: int) -> Run:
    """The products of the linear layers, by the kernels of the pass: no pass with these kernels is faster."""
    from encoder.qwen3.cpu.kernels.library import load_kernels

    kernels = load_kernels()
    assert kernels is not None, "nothing was compiled"
    shapes = [(SIZE, WIDTH + 2 * KV_WIDTH), (WIDTH, SIZE), (SIZE, 2 * INNER), (INNER, SIZE)]
    random = np.random.default_rng(0)
    weights = [
        (kernels.prepack([random.integers(0x3F00, 0x4000, (outputs, inputs), np.uint16)], threads), inputs, outputs)
        for _ in range(layers)
        for inputs, outputs in shapes
    ]

    def run(lengths: Sequence[int]) -> None:
        inputs = {size: np.ones((sum(lengths), size), np.float32) for size, _ in shapes}
        for panels, size, outputs in weights:
            kernels.multiply(inputs[size], panels, outputs, True, threads)

    return run


def work(side: str, folder: Path, layers: int, threads: int) -> None:
    """Answer each list of lengths."""
    loaders: dict[str, Callable[[], Run]] = {
        "torch": lambda: load_torch(folder, threads),
        "ours": lambda: load_encoder(folder, threads),
        WITHOUT_KERNELS: lambda: load_encoder(folder, threads, kernels=False),
        "plain": lambda: load_encoder(folder, threads, plain=True),
        PRODUCTS: lambda: load_products(layers, threads),
    }
    answer_requests(loaders[side]())


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--lengths", type=int, nargs="+", default=(), help="of single sequences")
    parser.add_argument("--plain", action="store_true", help="time encoder/qwen3/model.py too")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.folder, options.layers, options.threads)
        return
    with report(options.output) as rows:
        rows += measure(options.rounds, options.layers, options.threads, options.lengths, options.plain)


if __name__ == "__main__":
    main()
