"""The forward pass on a CPU beside transformers' on PyTorch: same weights, same tokens, one process each, in turn.

    make bench                     in .venv-parity, which has PyTorch
    python benchmarks/forward.py [--rounds 5] [--threads 2] [--layers 28]

Dims of Qwen3-0.6B, random weights. PyTorch gets a right-padded batch with its mask, in inference mode; the encoder gets
the prompts as they are. Prints medians in seconds, the ratio, and the part of the encoder's matrix products' own time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, list[int]] = {
    "1x12": [12],
    "1x28": [28],
    "1x44": [44],
    "1x77": [77],
    "1x512": [512],
    "8x64": [64] * 8,
    "ragged 18..120": [18, 25, 31, 40, 52, 77, 90, 120],
}
KINDS = ("torch", "plain", "packed", "products")
D, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1024, 3072, 16, 8, 128, 151936
GAP_S = 0.3  # BLAS threads spin for a while after a call, and would tax the next process
Run = Callable[[Sequence[int]], Any]


def token_ids(length: int) -> list[int]:
    """The same for both sides."""
    return list(np.random.default_rng(length).integers(0, VOCABULARY, length).tolist())


def write_weights(folder: Path, layers: int) -> None:
    """A Hugging Face folder of random bfloat16 weights."""
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, D), "norm.weight": (D,)}
    for layer in range(layers):
        at = f"layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (kv_width, D) for name in "kv"}
        shapes |= {f"{at}.self_attn.q_proj.weight": (width, D), f"{at}.self_attn.o_proj.weight": (D, width)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (MLP, D) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (D, MLP)}
    tensors = {
        name: (random.standard_normal(shape, np.float32) * (0.03 if len(shape) > 1 else 0.2) + (len(shape) == 1))
        for name, shape in shapes.items()
    }
    save_file(
        {f"model.{name}": tensor.astype(np.float32) for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": D,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def load_torch(folder: Path, threads: int) -> Run:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()

    def run(lengths: Sequence[int]) -> None:
        input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, length in zip(input_ids, lengths, strict=True):
            row[:length] = torch.tensor(token_ids(length))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        with torch.inference_mode():
            model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)

    return run


def load_encoder(folder: Path, threads: int, packed: bool) -> Run:
    import mlx.core as mx
    from mlx.utils import tree_unflatten

    from encoder.blas import set_threads
    from encoder.config import Qwen3Config
    from encoder.forward import PackedForward, PlainForward
    from encoder.qwen3 import Qwen3
    from encoder.types import Job, Tap

    config = Qwen3Config.from_dict(json.loads((folder / "config.json").read_text()))
    model = Qwen3(config)
    arrays = mx.load(str(folder / "model.safetensors"))
    model.update(tree_unflatten([(name.removeprefix("model."), array) for name, array in arrays.items()]))
    mx.eval(model.parameters())
    del arrays
    set_threads(threads)
    forward = (PackedForward if packed else PlainForward)(model, pad_token_id=0)
    tap = Tap(config.num_hidden_layers, normed=True)

    def run(lengths: Sequence[int]) -> None:
        jobs = [
            Job(tuple(token_ids(n)), n, n, dropped_rows=0, taps=(tap,), combine="concat", dtype="float32")
            for n in lengths
        ]
        mx.eval(list(forward(jobs, [tap])[tap]))

    return run


def load_products(layers: int, threads: int) -> Run:
    """The matrix products of the linear layers alone, through the same BLAS: no forward pass can be faster."""
    import mlx.core as mx

    from encoder.blas import set_threads

    set_threads(threads)
    shapes = [(D, HEADS * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM), (HEADS * HEAD_DIM, D), (D, 2 * MLP), (MLP, D)]
    weights = [[mx.random.normal(shape) for shape in shapes] for _ in range(layers)]
    mx.eval(weights)

    def run(lengths: Sequence[int]) -> None:
        rows = -(-sum(lengths) // 16) * 16
        inputs = [mx.random.normal((rows, shape[0])) for shape in shapes]
        mx.eval(inputs)
        mx.eval([x @ w for layer in weights for x, w in zip(inputs, layer, strict=True)])

    return run


def work(kind: str, folder: Path, layers: int, threads: int) -> None:
    """Answer each line of lengths with the seconds that they took."""
    if kind != "torch":
        import encoder  # noqa: F401  # puts a fast BLAS under MLX, which must not be imported before

    run = {
        "torch": lambda: load_torch(folder, threads),
        "plain": lambda: load_encoder(folder, threads, packed=False),
        "packed": lambda: load_encoder(folder, threads, packed=True),
        "products": lambda: load_products(layers, threads),
    }[kind]()
    print("ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        run(json.loads(line))
        print(time.perf_counter() - started, flush=True)


class Worker:
    """One kind in a process of its own."""

    def __init__(self, kind: str, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--work", kind, "--folder", str(folder)]
        command += ["--layers", str(arguments.layers), "--threads", str(arguments.threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self, lengths: Sequence[int]) -> float:
        """Seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(list(lengths)) + "\n")
        self._process.stdin.flush()
        seconds = float(self._answer())
        time.sleep(GAP_S)
        return seconds

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended early; its error stands above")
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds by case and kind; all kinds take turns in every round."""
    workers = {kind: Worker(kind, folder, arguments) for kind in arguments.kinds}
    seconds: dict[str, dict[str, list[float]]] = {case: {kind: [] for kind in workers} for case in CASES}
    for round_number in range(arguments.rounds + 1):
        for case, lengths in CASES.items():
            for kind, worker in workers.items():
                taken = worker.run(lengths)
                if round_number:  # the first one warms up
                    seconds[case][kind].append(taken)
    for worker in workers.values():
        worker.close()
    return {case: {kind: statistics.median(values) for kind, values in row.items()} for case, row in seconds.items()}


def table(medians: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    kinds = list(next(iter(medians.values())))
    lines = [
        "| tokens | " + " | ".join(kinds) + " | torch / packed | products / packed |",
        "|---" * (len(kinds) + 3) + "|",
    ]
    for case, row in medians.items():
        ratios = [f"{row[kind] / row['packed']:.2f}" if kind in row else "" for kind in ("torch", "products")]
        lines.append(f"| {case} | " + " | ".join([*(f"{row[kind]:.3f}" for kind in kinds), *ratios]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.folder, arguments.layers, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), arguments.layers)
        medians = measure(Path(folder), arguments)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}; seconds, medians")
    print(table(medians))


if __name__ == "__main__":
    main()
