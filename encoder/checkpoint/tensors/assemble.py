"""From the arrays in some files to the tensors of the model.

Arrays of one module belong together; what they mean, a scheme knows. A scheme is a function that gets all arrays of one
module, takes out those of its own quantization, and returns the tensor that they make. An array that no scheme takes
must be plain floats.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from encoder.checkpoint.tensors.encodings import FLOATS, Doubles, Plain
from encoder.checkpoint.tensors.keys import EncoderKeys, find_encoder
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

_INTEGERS = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_PARAMETERS = ("weight", "bias", "sinks")
_BUFFERS = ("position_ids", "cache_position", "causal_mask", "attn_mask", "masked_bias")

# The arrays of one module, by the last part of their name: "weight", "bias", "scales", "weight.absmax", ...
Parts = dict[str, StoredArray]


@dataclass(frozen=True, slots=True)
class Hints:
    """What a checkpoint says, beside its arrays, about how to read them.

    Attributes:
        config: the parsed config.json, empty where there is none.
        metadata: the metadata in the files' headers.
        dims: the dims that config.json says; None where there is none.
        bits: bits of a quantized number, by the module's path with its prefix, where the format says it.
        prefix: of the keys, which descriptions of single modules in `config` and `metadata` may have, too.
        notices: what schemes have met and read in a way that the user should know of, and how often.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    dims: Qwen3Config | None = None
    bits: Mapping[str, int] = field(default_factory=dict)
    prefix: str = ""
    notices: Counter[str] = field(default_factory=Counter)


Scheme = Callable[[str, Parts, Hints], StoredTensor | None]


@dataclass(frozen=True, slots=True)
class Assembled:
    """The encoder's tensors by parameter name, the prefix of their keys, and what to tell the user of the others."""

    tensors: dict[str, StoredTensor]
    prefix: str
    warnings: tuple[str, ...]


def by_key(arrays: Iterable[StoredArray]) -> list[tuple[str, StoredArray]]:
    """The arrays under their own keys, as `assemble` takes them."""
    return [(array.key, array) for array in arrays]


def assemble(
    named: Sequence[tuple[str, StoredArray]],
    schemes: Sequence[Scheme],
    hints: Hints,
    where: str,
    component: str | None = None,
) -> Assembled:
    """The encoder's tensors.

    Args:
        named: all arrays of a checkpoint, which may hold other models, each under its key.
        schemes: the quantizations that the format can hold. They are asked in this order.
        hints: for the schemes; the prefix is filled in here.
        where: the file or folder, for messages.
        component: as of `find_encoder`.
    Errors: CheckpointError for no Qwen3 or several, for two arrays of one parameter, and for an array that no scheme
        takes and that is not plain floats.
    """
    keys = find_encoder([key for key, _ in named], where, component)
    _check_tied(keys, hints, where)
    hints = replace(hints, prefix=keys.prefix)
    tensors: dict[str, StoredTensor] = {}
    buffers: list[str] = []
    for path, parts in _modules(named, keys).items():
        found = (scheme(path, parts, hints) for scheme in schemes)
        for tensor in [tensor for tensor in found if tensor is not None] + _plain(path, parts, buffers):
            tensors[tensor.name] = tensor
    unread = replace(keys, unneeded=(*keys.unneeded, *buffers)).warnings
    return Assembled(
        tensors, keys.prefix, (*unread, *(f"{count:,} x {notice}" for notice, count in hints.notices.items()))
    )


def take(parts: Parts, *names: str) -> Parts:
    """Remove the arrays of these names from `parts` and return them; names that are absent are skipped."""
    return {name: parts.pop(name) for name in names if name in parts}


def is_buffer(part: str, parts: Parts) -> bool:
    """Whether an array of a module is integers that PyTorch kept beside the parameters, which say nothing of them."""
    plain = "weight" in parts and parts["weight"].dtype in FLOATS
    return parts[part].dtype in _INTEGERS and part not in _PARAMETERS and (plain or part in _BUFFERS)


def _check_tied(keys: EncoderKeys, hints: Hints, where: str) -> None:
    head = next(
        (key for key, name in keys.names.items() if name.startswith("embed_tokens.") and "lm_head" in key), None
    )
    if head is not None and hints.dims is not None and not hints.dims.tie_word_embeddings:
        raise CheckpointError(
            f"{where}: has no embed_tokens, and its {head} is another matrix, since tie_word_embeddings is false. "
            f"Is the checkpoint complete?"
        )


def _modules(named: Iterable[tuple[str, StoredArray]], keys: EncoderKeys) -> dict[str, Parts]:
    """The encoder's arrays, by the path of their module."""
    modules: dict[str, Parts] = {}
    for key, array in named:
        name = keys.names.get(key)
        if name is None:
            continue
        path, part = _split(name)
        first = modules.setdefault(path, {}).setdefault(part, array)
        if first is not array:
            raise CheckpointError(
                f"{array.file}: {array.key} is the parameter {name}, which {first.file.name} already has as "
                f"{first.key}. Are these two variants of one model? Give the file to serve as --model, or remove one."
            )
    return modules


def _split(name: str) -> tuple[str, str]:
    """The path of the module, and the rest. What a library keeps under the weight is the module's, `weight.absmax`."""
    path, under_weight, rest = name.partition(".weight.")
    if under_weight:
        return path, f"weight.{rest}"
    path, _, part = name.rpartition(".")
    return path, part


def _plain(path: str, parts: Parts, buffers: list[str]) -> list[StoredTensor]:
    """The tensors of the arrays that no scheme has taken. Integers that are no parameter are added to `buffers`."""
    tensors = []
    for part, array in parts.items():
        if is_buffer(part, parts):
            buffers.append(array.key)
            continue
        if array.dtype not in (*FLOATS, "F64"):
            raise CheckpointError(
                f"{array.file}: {array.key} has dtype {array.dtype}, expected {', '.join(FLOATS)}, "
                f"or scales beside it that say how it is quantized."
            )
        name = f"{path}.{part}" if path else part
        tensors.append(_floats(name, _as_vector(array) if name.endswith("norm.weight") else array))
    return tensors


def _as_vector(array: StoredArray) -> StoredArray:
    """A norm's weights without axes of length 1, which some converters add."""
    lengths = tuple(length for length in array.shape if length != 1)
    return replace(array, shape=lengths) if len(lengths) == 1 else array


def _floats(name: str, array: StoredArray) -> StoredTensor:
    if array.dtype == "F64":
        return StoredTensor(name, array.shape, Doubles(), {"weight": replace(array, shape=(*array.shape, 8))})
    return StoredTensor(name, array.shape, Plain(FLOATS[array.dtype]), {"weight": array})
