"""Whether the weights fit is known before a tensor is read, and the message says what would fit."""

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from encoder import CheckpointError, TextEncoder
from encoder.checkpoint import load_weights, open_checkpoint
from encoder.checkpoint.loading import memory
from encoder.checkpoint.loading.residency import plan_residents
from encoder.options import ModelOptions
from encoder.qwen3.forward import cpu_kernels
from encoder.qwen3.model import Qwen3
from tests.checkpoints import write_checkpoint, write_json, write_tokenizer

GIB = 2**30
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1e6,
}


@pytest.fixture
def qwen3_4b(tmp_path: Path) -> Path:
    """A checkpoint of 8 GB of zeros that takes no room on disk."""
    layer = {
        "input_layernorm": [2560], "post_attention_layernorm": [2560], "self_attn.q_norm": [128],
        "self_attn.k_norm": [128], "self_attn.q_proj": [4096, 2560], "self_attn.k_proj": [1024, 2560],
        "self_attn.v_proj": [1024, 2560], "self_attn.o_proj": [2560, 4096], "mlp.gate_proj": [9728, 2560],
        "mlp.up_proj": [9728, 2560], "mlp.down_proj": [2560, 9728],
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [151936, 2560], "model.norm.weight": [2560]}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(36) for name, shape in layer.items()}
    header: dict[str, Any] = {}
    offset = 0
    for key, shape in shapes.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + offset)
    write_json(tmp_path / "config.json", QWEN3_4B)
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("gib", "advice"),
    [
        pytest.param(15, r"--compute-dtype bfloat16 \(8.8 GB\), --quantize 8 \(\d.\d GB\), --quantize 4", id="15"),
        pytest.param(6, r"What fits: --quantize 8 \(\d.\d GB\), --quantize 4 \(\d.\d GB\)\.", id="6"),
        pytest.param(4, r"What fits: --quantize 4 \(\d.\d GB\)\.", id="4"),
        pytest.param(1, r"No quantization of this checkpoint fits either", id="1"),
    ],
)
def test_what_would_fit_is_said_at_once(qwen3_4b: Path, gib: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before minutes of loading, and before the kernel kills the process."""
    monkeypatch.setattr(memory, "available_bytes", lambda: gib * GIB)
    monkeypatch.setattr("encoder.text_encoder.widens_bfloat16", lambda config: False)
    started = time.process_time()

    with pytest.raises(CheckpointError, match=rf"need 16.9 GB of memory in float32, and .*{advice}"):
        TextEncoder.open(ModelOptions(str(qwen3_4b), compute_dtype="float32"))
    assert time.process_time() - started < 2


@pytest.mark.skipif(cpu_kernels() is None, reason="no kernels were compiled for this CPU")
def test_bfloat16_weights_take_their_own_size_to_compute_float32(
    qwen3_4b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 6 * GIB)

    with pytest.raises(CheckpointError, match=r"need 8.8 GB of memory in bfloat16, and .*What fits: --quantize 8"):
        TextEncoder.open(ModelOptions(str(qwen3_4b), compute_dtype="float32"))


def test_27_layers_of_a_4b_model_fit_into_16_gib(qwen3_4b: Path) -> None:
    """What FLUX.2 klein needs, in float32."""
    checkpoint = open_checkpoint(ModelOptions(str(qwen3_4b)))
    tensors = [tensor for tensor in checkpoint.weights.tensors.values() if not is_past(tensor.name, 27)]

    assert memory.bytes_needed(plan_residents(tensors, mx.float32, None, keep=False).values()) < 14 * GIB


def is_past(name: str, layers: int) -> bool:
    return name.startswith("layers.") and int(name.split(".")[1]) >= layers


def test_tensors_of_layers_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    """Their bytes do not count as progress either."""
    weights = write_checkpoint(tmp_path, num_hidden_layers=4, tie_word_embeddings=False)
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))
    calls: list[tuple[int, int]] = []
    model = Qwen3(checkpoint.config)
    del model.layers[2:]
    load_weights(checkpoint, model, mx.float32, lambda done, total: calls.append((done, total)))

    assert calls[-1][1] == sum(array.nbytes for name, array in weights.items() if not is_past(name, 2))


def test_memory_of_this_machine_is_known() -> None:
    """More than nothing, less than a thousand GB."""
    available = memory.available_bytes()

    assert available is not None and 10**8 < available < 10**15


def test_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel kills a process that exceeds the limit, but it drops page cache first."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 200\nactive_file 50\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)

    assert memory.available_bytes() == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() != 650
