"""From the arrays in some files to the tensors of the model.

Arrays of one module belong together; what they mean, a scheme knows. A scheme is a function that gets all arrays of one
module, takes out those of its own quantization, and returns the tensor that they make. An array that no scheme takes
must be plain floats.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from encoder.checkpoint.tensors.encodings import FLOATS, Plain
from encoder.checkpoint.tensors.keys import parameter_name
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

log = logging.getLogger(__name__)

# The arrays of one module, by the last part of their name: "weight", "bias", "scales", "weight.absmax", ...
Parts = dict[str, StoredArray]


@dataclass(frozen=True, slots=True)
class Hints:
    """What a checkpoint says, beside its arrays, about how to read them.

    Attributes:
        config: the parsed config.json, empty where there is none.
        metadata: the metadata in the files' headers.
        dims: the dims that config.json says; None where there is none.
        bits: bits of a quantized number, by the path of the module, where the format says it.
        notices: what schemes have met and read in a way that the user should know of, and how often. `assemble` logs
            it as warnings.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dims: Qwen3Config | None = None
    bits: Mapping[str, int] = field(default_factory=dict)
    notices: Counter[str] = field(default_factory=Counter)


Scheme = Callable[[str, Parts, Hints], StoredTensor | None]


def by_key(arrays: Iterable[StoredArray]) -> list[tuple[str, StoredArray]]:
    """The arrays under their own keys, as `assemble` takes them."""
    return [(array.key, array) for array in arrays]


def assemble(
    named: Iterable[tuple[str, StoredArray]], schemes: Sequence[Scheme], hints: Hints
) -> dict[str, StoredTensor]:
    """The encoder's tensors, by parameter name.

    Args:
        named: the arrays, each under a key that `parameter_name` understands.
        schemes: the quantizations that the format can hold. They are asked in this order.
        hints: for the schemes.
    Errors: CheckpointError for two arrays of one parameter, and for an array that no scheme takes and that is not
        plain floats.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, parts in _modules(named).items():
        found = (scheme(path, parts, hints) for scheme in schemes)
        for tensor in [tensor for tensor in found if tensor is not None] + _plain(path, parts):
            tensors[tensor.name] = tensor
    for notice, count in hints.notices.items():
        log.warning("%d x %s", count, notice)
    return tensors


def take(parts: Parts, *names: str) -> Parts:
    """Remove the arrays of these names from `parts` and return them; names that are absent are skipped."""
    return {name: parts.pop(name) for name in names if name in parts}


def _modules(named: Iterable[tuple[str, StoredArray]]) -> dict[str, Parts]:
    """The encoder's arrays, by the path of their module."""
    modules: dict[str, Parts] = {}
    for key, array in named:
        name = parameter_name(key)
        if name is None:
            continue
        path, part = _split(name)
        first = modules.setdefault(path, {}).setdefault(part, array)
        if first is not array:
            raise CheckpointError(
                f"{array.file.name}: {array.key} is the parameter {name}, "
                f"which {first.file.name} already has as {first.key}. Remove one of the two."
            )
    return modules


def _split(name: str) -> tuple[str, str]:
    """The path of the module, and the rest. What a library keeps under the weight is the module's, `weight.absmax`."""
    path, under_weight, rest = name.partition(".weight.")
    if under_weight:
        return path, f"weight.{rest}"
    path, _, part = name.rpartition(".")
    return path, part


def _plain(path: str, parts: Parts) -> list[StoredTensor]:
    tensors = []
    for part, array in parts.items():
        if array.dtype not in FLOATS:
            raise CheckpointError(
                f"{array.file.name}: {array.key} has dtype {array.dtype}, expected {', '.join(FLOATS)}, "
                f"or scales beside it that say how it is quantized."
            )
        name = f"{path}.{part}" if path else part
        tensors.append(StoredTensor(name, array.shape, Plain(FLOATS[array.dtype]), {"weight": array}))
    return tensors
