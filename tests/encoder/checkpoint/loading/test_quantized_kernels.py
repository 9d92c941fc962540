"""Weights without a kernel on the device are decoded while loading, so that no prompt fails."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from encoder import CheckpointError, TextEncoder
from encoder.checkpoint.loading import quantized_kernels
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.options import ModelOptions
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


def test_kernel_that_does_not_run_is_found(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As MLX with CUDA does for some bits and group sizes."""
    caplog.set_level("INFO")
    monkeypatch.setattr(quantized_kernels.mx, "quantized_matmul", refuse)

    assert not quantized_kernels._runs(AFFINE_4, mx.float32, (256, 512), False)
    assert "this device has no kernel for affine 4-bit in groups of 64" in caplog.text


def test_weights_without_a_kernel_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored weights are decoded; a quantization that the user asks for is refused."""
    write_quantized(tmp_path, {"bits": 4, "group_size": 64})
    monkeypatch.setattr("encoder.checkpoint.loading.residency.has_kernel", lambda *arguments, **options: False)

    kept = TextEncoder.open(ModelOptions(str(tmp_path), quantize="keep"))

    assert kept.info.quantization == "affine 4-bit in groups of 64, decoded"
    with pytest.raises(CheckpointError, match="quantize 8: this device has no kernel for it"):
        TextEncoder.open(ModelOptions(str(tmp_path), quantize="8"))
