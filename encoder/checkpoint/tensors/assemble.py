"""From the arrays in some files to the tensors of the model. Knows which arrays belong together, not what they mean.

What a quantization stores beside a weight is known to a scheme: a function that is shown all arrays of one module,
takes out those that it understands, and returns the tensor that they are. What no scheme takes must be plain floats.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from encoder.checkpoint.tensors.encodings import FLOATS, Plain
from encoder.checkpoint.tensors.keys import parameter_name
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

Parts = dict[str, StoredArray]  # of one module, by the last part of the name: "weight", "bias", "scales", ...


@dataclass(frozen=True, slots=True)
class Hints:
    """What stands beside the arrays and says how to read them.

    Attributes:
        config: the parsed config.json, empty where there is none.
        metadata: of the files' headers.
        dims: where they are known without looking at the arrays.
        bits: of a quantized number, by the path of the module, where the format says it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dims: Qwen3Config | None = None
    bits: Mapping[str, int] = field(default_factory=dict)


Scheme = Callable[[str, Parts, Hints], StoredTensor | None]


def by_key(arrays: Iterable[StoredArray]) -> list[tuple[str, StoredArray]]:
    """The arrays under their own keys, for files whose keys are those of the model that was saved."""
    return [(array.key, array) for array in arrays]


def assemble(
    named: Iterable[tuple[str, StoredArray]], schemes: Sequence[Scheme], hints: Hints
) -> dict[str, StoredTensor]:
    """The encoder's tensors, by parameter name.

    Args:
        named: the arrays, each under a key of the forms that `parameter_name` knows.
        schemes: that are asked, in this order.
        hints: for them.
    Errors: CheckpointError for two arrays that are the same thing, and for one that nobody understands.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, parts in _modules(named).items():
        found = (scheme(path, parts, hints) for scheme in schemes)
        for tensor in [tensor for tensor in found if tensor is not None] + _plain(path, parts):
            tensors[tensor.name] = tensor
    return tensors


def take(parts: Parts, *names: str) -> Parts:
    """Take those of the named arrays that are there out of `parts`."""
    return {name: parts.pop(name) for name in names if name in parts}


def _modules(named: Iterable[tuple[str, StoredArray]]) -> dict[str, Parts]:
    """The arrays that the encoder needs, by the path of their module."""
    modules: dict[str, Parts] = {}
    for key, array in named:
        name = parameter_name(key)
        if name is None:
            continue
        path, _, part = name.rpartition(".")
        first = modules.setdefault(path, {}).setdefault(part, array)
        if first is not array:
            raise CheckpointError(
                f"{array.file.name}: {array.key} is the parameter {name}, "
                f"which {first.file.name} already has as {first.key}. Remove one of the two."
            )
    return modules


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
