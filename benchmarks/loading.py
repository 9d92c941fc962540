"""Time and memory of loading a checkpoint of several GB, compared with reading its file.

    python benchmarks/loading.py [--layers 12] [--compute-dtype auto] [--quantize auto] [--folder /tmp]

Besides loading, its two unavoidable parts are measured: reading the files, and writing to fresh memory of that size.
The checkpoint has the dims of Qwen3-4B with fewer layers and random weights, in shards of 2 GB. Each measurement runs
in a process of its own, first with a cold page cache if the system can drop a file from it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SHARD_BYTES = 2 * 10**9
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
CHUNK_BYTES = 8 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--compute-dtype", default="auto")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--folder", type=Path, default=None, help="where the checkpoint is made; needs room for it")
    parser.add_argument("--widening", type=int, default=2, help="bytes in memory for a byte of the file")
    parser.add_argument("--measure", choices=("read", "load", "touch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "read":
        return read(options.folder)
    if options.measure == "touch":
        return touch(sum(file.stat().st_size for file in options.folder.glob("*.safetensors")) * options.widening)
    if options.measure == "load":
        return load(options.folder, options.compute_dtype, options.quantize)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        size = write_checkpoint(folder, options.layers)
        print(f"checkpoint: {size / 1e9:.2f} GB in bfloat16, {options.layers} layers of Qwen3-4B")
        for cold in (True, False):
            results = {}
            for what in ("read", "touch", "load"):
                if cold:
                    drop_from_page_cache(folder)
                results[what] = measure(what, folder, options)
            print(f"{'from disk' if cold else 'from page cache'}:")
            for what, result in results.items():
                print(f"  {what}: " + ", ".join(f"{name} {value:.2f}" for name, value in result.items()))
            load_s, read_s, touch_s = (results[what]["seconds"] for what in ("load", "read", "touch"))
            print(f"  load / read: {load_s / read_s:.2f}, load / (read + touch): {load_s / (read_s + touch_s):.2f}")


def measure(what: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    command += ["--compute-dtype", options.compute_dtype, "--quantize", options.quantize]
    command += ["--widening", str(options.widening)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    finished = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def read(folder: Path) -> None:
    """Read all files from front to back into one small buffer."""
    buffer = bytearray(CHUNK_BYTES)
    started = time.perf_counter()
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                size += count
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "GB/s": size / 1e9 / seconds}))


def load(folder: Path, compute_dtype: str, quantize: str) -> None:
    """Load the checkpoint as the service does, and stop before the first forward pass."""
    import encoder  # noqa: I001  # first: it chooses the BLAS that mlx.core is bound to

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from encoder.checkpoint import load_weights
    from encoder.qwen3.model import Qwen3
    from encoder.text_encoder import COMPUTE_DTYPES, resolve_compute_dtype

    checkpoint = encoder.open_checkpoint(encoder.ModelOptions(str(folder)))
    model = Qwen3(checkpoint.config)
    base = peak_bytes()
    dtype = COMPUTE_DTYPES[resolve_compute_dtype(compute_dtype, checkpoint.dtype, False)]
    started = time.perf_counter()
    load_weights(checkpoint, model, dtype, quantize=quantize)
    seconds = time.perf_counter() - started
    stored = [tensor.nbytes for tensor in checkpoint.weights.tensors.values()]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "GB/s": sum(stored) / 1e9 / seconds,
                "resident GB": sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values()) / 1e9,
                "largest stored tensor GB": max(stored) / 1e9,
                "peak GB of MLX": mx.get_peak_memory() / 1e9,
                "peak GB of the process": (peak_bytes() - base) / 1e9,
            }
        )
    )


def peak_bytes() -> int:
    """Peak resident memory of this process. On Linux, getrusage would report the parent's peak where that is higher."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def touch(size: int) -> None:
    """Write `size` bytes of fresh memory, as any loader must."""
    started = time.perf_counter()
    np.full(size // 8, 1, np.int64)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "GB/s": size / 1e9 / seconds}))


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write random bfloat16 weights. Returns the bytes of all shards."""
    from safetensors.numpy import save_file

    from encoder.checkpoint.files.demo_files import demo_files

    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(demo_files()[name])
    generator = np.random.default_rng(0)
    shard: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}
    total = count = 0

    def flush() -> None:
        nonlocal count
        count += 1
        name = f"model-{count:05}.safetensors"
        save_file(shard, folder / name)
        os.sync()
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, shape in shapes(config).items():
        # Bits of bfloat16 numbers of either sign between 2**-7 and 2**-5.
        bits = generator.integers(0, 2**16, shape, np.uint16) & 0x80FF | 0x3C00
        shard[key] = bits.view(bfloat16())
        total += bits.nbytes
        if sum(array.nbytes for array in shard.values()) > SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return total


def shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by key."""
    d, f, v = 2560, 9728, 151936
    layer = {
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
        "self_attn.q_norm": (128,), "self_attn.k_norm": (128,),
        "self_attn.q_proj": (4096, d), "self_attn.k_proj": (1024, d), "self_attn.v_proj": (1024, d),
        "self_attn.o_proj": (d, 4096), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
    }  # fmt: skip
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for index in range(int(str(config["num_hidden_layers"]))):
        named |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return named


def bfloat16() -> np.dtype:
    """NumPy's bfloat16, which safetensors knows how to write."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to drop the files from the page cache; Linux only."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
