"""The forward pass on a CPU beside transformers' on PyTorch: same weights, same tokens, one process each, in turn.

    python -m benchmarks.forward [--rounds 5] [--threads 2] [--layers 28] [--lengths 19 21 23] [--plain]

Dims of Qwen3-0.6B in float32, random weights. PyTorch gets a right-padded batch with its mask, in inference mode; the
encoder gets the prompts as they are. `no compiler` is the encoder without fused operations, as on a machine that has no
C++ compiler; with `nothing compiled` it lacks kernels/c/panels.c too, as where there was none when it was installed.
`BLAS products` are the linear layers' matrix products alone, of the same sizes, through the BLAS; `own products` are
they through kernels/c/panels.c.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
SHORT = 128  # tokens, below which the encoder is to be ahead without a compiler too
LIMIT = "1 × 512"  # the case that is held against its matrix products
D, MLP = QWEN3_0_6B.hidden_size, QWEN3_0_6B.intermediate_size
WIDTH = QWEN3_0_6B.num_attention_heads * QWEN3_0_6B.head_dim
KV_WIDTH = QWEN3_0_6B.num_key_value_heads * QWEN3_0_6B.head_dim
WITHOUT_COMPILER = {  # in words, and the ratio to reach
    "no compiler": ("without a compiler", 1.0),
    "nothing compiled": ("where nothing was ever compiled", None),
}
PRODUCTS = {  # in words, and the percentage to reach
    "BLAS products": ("the products through the BLAS, over ours", 88.0),
    "own products": ("the products through kernels/c/panels.c, over ours", None),
}
WITHOUT_PANELS = ("nothing compiled", "BLAS products")
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
        workers = {
            side: stack.enter_context(Worker(MODULE, "--work", side, *options, **_environment(side))) for side in sides
        }
        seconds = take_turns(workers, cases, rounds)
    return [row for case in cases for row in _rows(case, seconds[case.name])]


def _environment(side: str) -> dict[str, str]:
    environment = {"MLX_DISABLE_COMPILE": "1"} if side in WITHOUT_COMPILER else {}
    if side in WITHOUT_PANELS:
        from encoder.qwen3.cpu.blas import activate  # not above: whoever imports it gets its BLAS

        environment["LD_PRELOAD"] = activate().path or ""  # a BLAS that is there already is left alone
    return environment


def _cases(lengths: Sequence[int], plain: bool) -> list[Case]:
    wanted = {f"1 × {length}": [length] for length in lengths} or {name: case[0] for name, case in CASES.items()}
    return [
        Case(
            name,
            sequences,
            ["ours", "torch"]
            + list(WITHOUT_COMPILER) * (sum(sequences) < SHORT)
            + _products() * (name == LIMIT)
            + ["plain"] * plain,
        )
        for name, sequences in wanted.items()
    ]


def _products() -> list[str]:
    """Those that this machine can compute."""
    from encoder.qwen3.cpu.panels import has_panels  # as above

    return [side for side in PRODUCTS if side in WITHOUT_PANELS or has_panels()]


def _rows(case: Case, seconds: dict[str, float]) -> list[Row]:
    goal = CASES[case.name][1] if case.name in CASES else None
    named = f"forward, {case.name} tokens, float32"
    main = {side: taken for side, taken in seconds.items() if side in ("ours", "torch", "plain")}
    rows = [compare(f"{named}: transformers on PyTorch over ours", MODULE, main, goal)]
    for side in [side for side in WITHOUT_COMPILER if side in seconds]:
        pair = {name: seconds[name] for name in (side, "torch")}
        words, goal = WITHOUT_COMPILER[side]
        rows.append(compare(f"{named}: the same, ours {words}", MODULE, pair, goal))
    for side in [side for side in PRODUCTS if side in seconds]:
        pair = {name: seconds[name] for name in ("ours", side)}
        words, percent = PRODUCTS[side]
        share = 100 * seconds[side] / seconds["ours"]
        rows.append(Row(f"{named}: {words}", MODULE, share, "%", percent, medians=pair))
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


def load_encoder(folder: Path, threads: int, plain: bool) -> Run:
    import encoder  # isort: skip  # noqa: F401  # puts a fast BLAS under MLX, which must not be imported before
    import mlx.core as mx

    from encoder.checkpoint import load_weights, open_checkpoint
    from encoder.options import ModelOptions
    from encoder.qwen3.cpu.blas import set_threads
    from encoder.qwen3.forward import Forward, choose_forward, widens_bfloat16
    from encoder.qwen3.model import Qwen3
    from encoder.qwen3.plain import PlainForward
    from encoder.types import Job, Tap

    checkpoint = open_checkpoint(ModelOptions(str(folder)))
    model = Qwen3(checkpoint.config)
    keep_bfloat16 = not plain and widens_bfloat16(checkpoint.config)
    load_weights(checkpoint, model, mx.float32, keep_bfloat16=keep_bfloat16)
    set_threads(threads)
    forward: Forward = PlainForward(model, 0) if plain else choose_forward(model, 0, mx.float32)
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
    """A part of each matrix for each CPU, and no thread waits for another: no forward pass of these is faster."""
    import encoder  # isort: skip  # noqa: F401  # as above
    import mlx.core as mx

    from encoder.qwen3.cpu.blas import set_threads
    from encoder.qwen3.cpu.packed_blas import turn
    from encoder.qwen3.cpu.panels import has_panels, lay

    set_threads(1)
    streams = [mx.new_stream(mx.cpu) for _ in range(threads)]
    split = [(D, WIDTH), (D, 2 * KV_WIDTH), (D, MLP), (D, MLP)]  # by outputs; the others by inputs
    shapes = [(inputs, outputs // threads) for inputs, outputs in split] + [(WIDTH // threads, D), (MLP // threads, D)]
    random = np.random.default_rng(0)
    dtype, made = (np.uint16, lay) if has_panels() else (np.float32, turn)

    def matrix(inputs: int, outputs: int) -> mx.array:
        numbers = random.integers(0x3F00, 0x4000, (outputs, inputs), np.uint16)  # bfloat16s around 1
        with ThreadPoolExecutor(threads) as workers:
            return made([numbers.astype(dtype)], workers)

    weights = [[[matrix(*shape) for shape in shapes] for _ in streams] for _ in range(layers)]

    def run(lengths: Sequence[int]) -> None:
        rows = -(-sum(lengths) // 4) * 4
        inputs = [mx.ones((rows, shape[0])) for shape in shapes]
        mx.eval(inputs)
        for layer in weights:
            products = []
            for stream, part in zip(streams, layer, strict=True):
                with mx.stream(stream):
                    products += [x @ w for x, w in zip(inputs, part, strict=True)]
            mx.eval(products)

    return run


def work(side: str, folder: Path, layers: int, threads: int) -> None:
    """Answer each list of lengths."""
    loaders: dict[str, Callable[[], Run]] = {
        "torch": lambda: load_torch(folder, threads),
        "ours": lambda: load_encoder(folder, threads, plain=False),
        **{side: lambda: load_encoder(folder, threads, plain=False) for side in WITHOUT_COMPILER},
        "plain": lambda: load_encoder(folder, threads, plain=True),
        **{side: lambda: load_products(layers, threads) for side in PRODUCTS},
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
