"""Fills a model from stored weights: strictly, one tensor at a time, on the calling thread."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.array_reader import ArrayReader, read_ahead
from encoder.checkpoint.loading.memory import check_memory
from encoder.checkpoint.loading.residency import EMBEDDING, Resident, label, plan
from encoder.checkpoint.tensors.quantization import Quantization
from encoder.errors import CheckpointError
from encoder.pipeline.finite import is_finite, is_float
from encoder.qwen3.model import Qwen3

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes read so far, bytes in all

FOLLOWS_THE_FILE = ("auto", "keep", "none")  # values of `quantize` that quantize nothing anew

_LISTED = 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the weights in memory are.

    Attributes:
        quantization: that they have, or had before they were decoded; None where they were floats all along.
        fingerprint: the checkpoint's, and another one once they have been quantized while loading.
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
        quantize: "none" makes everything floats; "keep" keeps what MLX has kernels for; "auto" keeps it on a GPU and
            not on a CPU, whose kernels are some 70 times slower than float32; anything else as `Quantization.parse`.
        keep_bfloat16: whether matrices stay as they are when all of them are stored in bfloat16, whatever `dtype` is.
    Returns:
        what is in memory now.
    Errors: CheckpointError for tensors that are missing, extra or misshapen, all in one; for NaN or infinity; and when
        the memory does not suffice.
    """
    check_weights(checkpoint, model)
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    residents = plan(
        checkpoint.tensors_of(len(model.layers)),
        dtype,
        None if quantize in FOLLOWS_THE_FILE else Quantization.parse(quantize),
        keep=quantize == "keep" or (quantize == "auto" and not on_cpu),
        keep_bfloat16=keep_bfloat16,
    )
    if quantize not in FOLLOWS_THE_FILE and label(residents) is None:
        raise CheckpointError(
            f"quantize {quantize}: this device has no kernel for it in {dtype}, or no weight has whole groups. "
            f"Choose another, or compute in bfloat16."
        )
    check_memory(residents.values())
    _explain(checkpoint, residents, dtype, on_cpu)
    loaded: dict[str, mx.array] = {}
    for values in read_values(checkpoint, residents, progress):
        loaded |= values
    model.update_modules(tree_unflatten(_quantized_layers(residents, model)))
    model.update(tree_unflatten(list(loaded.items())))
    return _loaded(checkpoint, residents, quantize)


def check_weights(checkpoint: Checkpoint, model: Qwen3) -> None:
    """Compare names and shapes with the model's parameters; reads no tensor.

    Errors: CheckpointError naming every tensor that is missing, extra or misshapen.
    """
    expected = {name: array.shape for name, array in dict(tree_flatten(model.parameters())).items()}
    stored = {tensor.name: tensor for tensor in checkpoint.tensors_of(len(model.layers))}
    problems = [f"{name} is missing, expected shape {shape}" for name, shape in expected.items() if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            problems.append(f"{tensor.file.name}: {tensor.key} of shape {tensor.shape} is not a parameter of Qwen3")
        elif tensor.shape != expected[name]:
            problems.append(f"{tensor.file.name}: {tensor.key} has shape {tensor.shape}, expected {expected[name]}")
    if problems:
        raise CheckpointError(_summary(problems))


def _summary(problems: list[str]) -> str:
    listed = problems[:_LISTED]
    if len(problems) > _LISTED:
        listed.append(f"and {len(problems) - _LISTED} more")
    return (
        "The tensors do not match config.json. Is the checkpoint complete, and are both from the same model?\n  "
        + "\n  ".join(listed)
    )


def _explain(checkpoint: Checkpoint, residents: Mapping[str, Resident], dtype: mx.Dtype, on_cpu: bool) -> None:
    """Say in the log when what was stored quantized takes more memory than its file, and when kernels will be slow."""
    stored = sum(resident.stored.nbytes for resident in residents.values())
    resident = sum(resident.nbytes for resident in residents.values())
    floats = str(dtype).removeprefix("mlx.core.")
    decoded = [r for r in residents.values() if r.stored.encoding.quantized and r.quantization is None]
    if decoded:
        log.info(
            "%s: %d of %d tensors are decoded to %s (%s): %.2f GB in the file, %.2f GB in memory",
            *(checkpoint.name, len(decoded), len(residents), floats, checkpoint.quantization),
            *(stored / 1e9, resident / 1e9),
        )
    if on_cpu and label(residents):
        log.warning("quantized weights stay quantized: on a CPU they save memory and are some 70 times slower")


def _loaded(checkpoint: Checkpoint, residents: Mapping[str, Resident], quantize: str) -> Loaded:
    resident, stored = label(residents), checkpoint.quantization
    fingerprint = checkpoint.fingerprint
    if resident is not None and quantize not in FOLLOWS_THE_FILE:
        fingerprint = hashlib.sha256(f"{fingerprint} {resident}".encode()).hexdigest()[: len(fingerprint)]
    return Loaded(resident or (stored and f"{stored}, decoded"), fingerprint)


def read_values(
    checkpoint: Checkpoint, residents: Mapping[str, Resident], progress: Progress | None = None
) -> Iterator[dict[str, mx.array]]:
    """What each tensor becomes, by name, evaluated and checked; one tensor after the other.

    Errors: CheckpointError for a tensor that cannot be read, and for NaN or infinity.
    """
    total = sum(resident.stored.nbytes for resident in residents.values())
    done = 0
    in_order = sorted(residents.values(), key=_place)  # front to back is fastest
    checked: set[Path] = set()
    with ArrayReader() as reader:
        for resident, following in zip_longest(in_order, in_order[1:]):
            arrays = resident.stored.arrays
            read_ahead(following.stored.arrays.values() if following else ())
            for file in {array.file for array in arrays.values()} - checked:
                checkpoint.weights.check_file(file)
                checked.add(file)
            yield _read(resident, reader)
            done += resident.stored.nbytes
            if progress is not None:
                progress(done, total)


def _place(resident: Resident) -> tuple[Path, int]:
    array = resident.stored.arrays["weight"]
    return array.file, array.offset


def _read(resident: Resident, reader: ArrayReader) -> dict[str, mx.array]:
    """What the tensor becomes, by name, evaluated and checked, and nothing else left in memory."""
    tensor = resident.stored
    if resident.is_exact:
        return {tensor.name: reader.read_floats(tensor.arrays["weight"], resident.dtype)}
    values = resident.values({role: reader.read(array) for role, array in tensor.arrays.items()})
    mx.eval(*values.values())
    mx.clear_cache()  # else the allocator keeps the stored tensor's buffer
    _check_finite(values, resident)
    return values


def _quantized_layers(residents: Mapping[str, Resident], model: Qwen3) -> list[tuple[str, nn.Module]]:
    """The layers that take the place of the plain ones; their weights are placeholders, never evaluated."""
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


def _check_finite(values: Mapping[str, mx.array], resident: Resident) -> None:
    tensor = resident.stored
    for value in values.values():
        if is_float(value):
            finite = bool(is_finite(value).item())
        else:
            finite = value.dtype != mx.uint8 or _scales_are_finite(value, resident.quantization)
        if not finite:
            raise CheckpointError(
                f"{tensor.file.name}: {tensor.key} has NaN or infinity as {value.dtype}, expected finite weights. "
                f"Fetch the file again; if it is stored so, it cannot be served."
            )


def _scales_are_finite(scales: mx.array, quantization: Quantization | None) -> bool:
    """Whether no 8-bit scale is NaN: float8_e4m3fn of either sign in nvfp4, powers of two in the others."""
    if quantization is not None and quantization.mode == "nvfp4":
        return _largest(scales & 0x7F) < 0x7F
    return _largest(scales) < 0xFF


def _largest(integers: mx.array) -> int:
    largest = mx.max(integers).item()
    assert isinstance(largest, int)
    return largest
