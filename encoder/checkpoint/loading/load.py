"""Fills a model with a checkpoint's weights, which `open_checkpoint` has compared with the dims."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.memory import check_memory
from encoder.checkpoint.loading.parameters import Progress, read_parameters
from encoder.checkpoint.loading.residency import (
    EMBEDDING,
    Resident,
    new_quantization,
    plan_residents,
    quantization_label,
)
from encoder.errors import CheckpointError
from encoder.qwen3.model import Qwen3

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is known of the weights in memory.

    Attributes:
        quantization: of the weights, for people; says "decoded" where they were quantized in the file and are floats
            now. None where they were floats all along.
        fingerprint: the checkpoint's, or another one where loading has quantized the weights anew.
    """

    quantization: str | None
    fingerprint: str


def load_weights(
    checkpoint: Checkpoint,
    model: Qwen3,
    dtype: mx.Dtype,
    progress: Progress | None = None,
    *,
    quantize: str = "auto",
    keep_bfloat16: bool = False,
) -> Loaded:
    """Fill `model` with the checkpoint's tensors, evaluated. Tensors of layers that the model lacks are not read.

    Memory peaks at the model and one stored tensor. MLX arrays belong to the thread that makes them, so call this on
    the thread that will run the model. When it fails, the model is as it was.

    Args:
        checkpoint: as opened.
        model: of the checkpoint's dims, perhaps with fewer layers.
        dtype: to compute in.
        progress: called after each tensor.
        quantize: as in ModelOptions.
        keep_bfloat16: whether matrices stay bfloat16 when all of them are stored in it, whatever `dtype` is.
    Errors: CheckpointError for NaN or infinity, and when the memory does not suffice.
    """
    quantization = new_quantization(quantize)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    residents = plan_residents(
        checkpoint.tensors_of(len(model.layers)),
        dtype,
        quantization,
        keep=quantize == "keep" or (quantize == "auto" and not on_cpu),
        keep_bfloat16=keep_bfloat16,
    )
    if quantization is not None and quantization_label(residents) is None:
        raise CheckpointError(
            f"quantize {quantize}: this device has no kernel for it in {dtype}, or no weight has whole groups. "
            f"Choose another, or compute in bfloat16."
        )
    check_memory(residents.values())
    _log_costs(checkpoint, residents, dtype, on_cpu)
    parameters: dict[str, mx.array] = {}
    for read in read_parameters(checkpoint, residents, progress):
        parameters |= read
    model.update_modules(tree_unflatten(_quantized_layers(residents, model)))
    model.update(tree_unflatten(list(parameters.items())))
    return _loaded(checkpoint, quantization_label(residents), quantized_anew=quantization is not None)


def _log_costs(checkpoint: Checkpoint, residents: Mapping[str, Resident], dtype: mx.Dtype, on_cpu: bool) -> None:
    """Log how much memory decoded weights take, and that quantized weights are slow on a CPU."""
    decoded = [r for r in residents.values() if r.stored.encoding.quantized and r.quantization is None]
    if decoded:
        stored = sum(resident.stored.nbytes for resident in residents.values())
        in_memory = sum(resident.nbytes for resident in residents.values())
        floats = str(dtype).removeprefix("mlx.core.")
        log.info(
            "%s: %d of %d tensors are decoded to %s (%s): %.2f GB in the file, %.2f GB in memory",
            *(checkpoint.name, len(decoded), len(residents), floats, checkpoint.quantization),
            *(stored / 1e9, in_memory / 1e9),
        )
    if on_cpu and quantization_label(residents):
        log.warning("quantized weights stay quantized: on a CPU they save memory and are some 70 times slower")


def _loaded(checkpoint: Checkpoint, in_memory: str | None, *, quantized_anew: bool) -> Loaded:
    fingerprint, in_file = checkpoint.fingerprint, checkpoint.quantization
    if quantized_anew:
        fingerprint = hashlib.sha256(f"{fingerprint} {in_memory}".encode()).hexdigest()[: len(fingerprint)]
    decoded = f"{in_file}, decoded" if in_file is not None else None
    return Loaded(in_memory or decoded, fingerprint)


def _quantized_layers(residents: Mapping[str, Resident], model: Qwen3) -> list[tuple[str, nn.Module]]:
    """The quantized layers that replace plain ones, by path. Their own weights are placeholders, never evaluated."""
    layers: list[tuple[str, nn.Module]] = []
    biased = {name for name in dict(tree_flatten(model.parameters())) if name.endswith(".bias")}
    for name, resident in residents.items():
        quantization = resident.quantization
        if quantization is None:
            continue
        rows, columns = resident.stored.shape
        path, group_size, bits = name.removesuffix(".weight"), quantization.group_size, quantization.bits
        if name == EMBEDDING:
            layer: nn.Module = nn.QuantizedEmbedding(rows, columns, group_size, bits, quantization.mode)
        else:
            layer = nn.QuantizedLinear(columns, rows, f"{path}.bias" in biased, group_size, bits, quantization.mode)
        layers.append((path, layer))
    return layers
