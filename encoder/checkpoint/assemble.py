"""From the arrays in some files to the tensors of the model. Knows which arrays belong together, not what they mean.

What a quantization stores beside a weight is known to a scheme: a function that is shown all arrays of one module, takes
out those that it understands, and returns the tensor that they are. What no scheme takes must be plain floats.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from encoder.checkpoint.encodings import FLOATS, Plain
from encoder.checkpoint.keys import parameter_name
from encoder.checkpoint.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError

Parts = dict[str, StoredArray]  # of one module, by the last part of the name: "weight", "bias", "scales", ...


@dataclass(frozen=True, slots=True)
class Hints:
    """What stands beside the arrays and says how to read them.

    Attributes:
        config: the parsed config.json, empty where there is none.
        metadata: of the files' headers.
        shapes: that the parameters must have, where the dims are known beforehand.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Scheme = Callable[[str, Parts, Hints], StoredTensor | None]


def assemble(arrays: Iterable[StoredArray], schemes: Sequence[Scheme], hints: Hints) -> dict[str, StoredTensor]:
    """The encoder's tensors, by parameter name.

    Errors: CheckpointError for two arrays that are the same thing, and for one that nobody understands.
    """
    tensors: dict[str, StoredTensor] = {}
    for path, parts in _modules(arrays).items():
        found = (scheme(path, parts, hints) for scheme in schemes)
        for tensor in [tensor for tensor in found if tensor is not None] + _plain(path, parts):
            tensors[tensor.name] = tensor
    return tensors


def _modules(arrays: Iterable[StoredArray]) -> dict[str, Parts]:
    """The arrays that the encoder needs, by the path of their module."""
    modules: dict[str, Parts] = {}
    for array in arrays:
        name = parameter_name(array.key)
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
