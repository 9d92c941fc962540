"""Weights without a kernel on the device are decoded while loading, so that no prompt fails."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from encoder import CheckpointError, TextEncoder
from encoder.checkpoint.loading import quantized_kernels
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.options import ComputeDType, ModelOptions
from tests.encoder.checkpoint.mlx_folders import write_quantized

AFFINE_4 = Quantization("affine", 4, 64)


@pytest.fixture(autouse=True)
def no_memory_of_kernels() -> Iterator[None]:
    """No test sees what an earlier one has tried."""
    quantized_kernels._runs.cache_clear()
    yield
    quantized_kernels._runs.cache_clear()


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("lookup", [True, False])
def test_kernel_that_runs_is_found(mode: str, lookup: bool) -> None:
    """On whatever device the tests run."""
    quantization = Quantization.from_fields({"mode": mode}, "here")

    assert quantized_kernels._runs(quantization, mx.bfloat16, (256, 512), lookup)


def refuse(*arguments: Any, **options: Any) -> mx.array:
    raise RuntimeError("cuGraphAddKernelNode(&node, graph_, NULL, 0, &params) failed: invalid argument")


@pytest.mark.parametrize(("operation", "lookup"), [("quantized_matmul", False), ("dequantize", True)])
def test_kernel_that_does_not_run_is_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, operation: str, lookup: bool
) -> None:
    """As MLX with CUDA does for some bits and group sizes. An embedding needs the one operation, a matrix the other."""
    caplog.set_level("INFO")
    monkeypatch.setattr(quantized_kernels.mx, operation, refuse)

    assert not quantized_kernels._runs(AFFINE_4, mx.float32, (256, 512), lookup)
    assert quantized_kernels._runs(AFFINE_4, mx.float32, (256, 512), not lookup)
    assert "this device has no kernel for affine 4-bit in groups of 64" in caplog.text


def test_a_few_rows_of_an_embedding_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of Qwen3's, decoded, would take a gigabyte. A product needs the whole matrix: its kernel depends on that."""
    tried: list[tuple[int, ...]] = []
    monkeypatch.setattr(quantized_kernels, "_runs", lambda quantization, dtype, shape, lookup: not tried.append(shape))
    monkeypatch.setattr(quantized_kernels.mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))

    for lookup in (True, False):
        assert quantized_kernels.has_kernel(AFFINE_4, mx.bfloat16, (151_936, 512), lookup=lookup)
    assert tried == [(256, 512), (151_936, 512)]


def test_embedding_is_kept_where_lookups_run_and_products_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is asked about by itself."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64})
    monkeypatch.setattr("encoder.checkpoint.loading.residency.has_kernel", lambda *arguments, lookup: lookup)
    model = TextEncoder.open(ModelOptions(str(tmp_path), quantize="keep")).model

    assert type(model.embed_tokens) is nn.QuantizedEmbedding
    assert type(model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(("dtype", "kind"), [("float32", nn.Embedding), ("bfloat16", nn.QuantizedEmbedding)])
def test_embedding_without_biases_is_kept_in_bfloat16_alone(
    tmp_path: Path, mode: str, dtype: ComputeDType, kind: type[nn.Module]
) -> None:
    """Its lookup returns bfloat16, whatever the layers compute in."""
    write_quantized(tmp_path, {"mode": mode})
    model = TextEncoder.open(ModelOptions(str(tmp_path), quantize="keep", compute_dtype=dtype)).model

    assert type(model.embed_tokens) is kind
    assert type(model.layers[0].mlp.up_proj) is nn.QuantizedLinear


def test_weights_without_a_kernel_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored weights are decoded; a quantization that the user asks for is refused."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64})
    monkeypatch.setattr("encoder.checkpoint.loading.residency.has_kernel", lambda *arguments, **options: False)

    kept = TextEncoder.open(ModelOptions(str(tmp_path), quantize="keep"))

    assert kept.info.quantization == "affine 4-bit in groups of 64, decoded"
    with pytest.raises(CheckpointError, match="quantize 8: this device has no kernel for it"):
        TextEncoder.open(ModelOptions(str(tmp_path), quantize="8"))
