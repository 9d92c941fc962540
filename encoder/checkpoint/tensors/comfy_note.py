"""ComfyUI's notes: what a file says of each layer's quantization.

A note is JSON: `{"format": "nvfp4", …}`. It is a tensor of bytes beside the weight, `<layer>.comfy_quant`, or stands in
the header under `_quantization_metadata`, by the layer's path in the file.
Source: ComfyUI 0271a46, comfy/ops.py:_load_quantized_module, comfy/utils.py:convert_old_quants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from encoder.checkpoint.tensors.assemble import Hints
from encoder.checkpoint.tensors.encodings import FLOATS
from encoder.checkpoint.tensors.json_text import parse_json_object
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError

_MAX_JSON_BYTES = 2**16
_MAX_COUNT = 2**20
_ROTATED_TOGETHER = 256  # columns, where a note does not say it
_INT8 = "int8_tensorwise"
_EMPTY = b"\0 \t\r\n"  # what tools write where there is nothing to say


@dataclass(frozen=True, slots=True)
class Note:
    """What the file says of one layer.

    Attributes:
        format: the name of its quantization.
        fields: all fields, those nested under `params` among them.
        where: the layer's file and tensor, for messages.
    """

    format: str
    fields: Mapping[str, Any]
    where: str

    def count(self, name: str, default: int) -> int:
        """A field that is a number of columns. Errors: CheckpointError for anything else."""
        value = self.fields.get(name, default)
        number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 8 else value
        if type(number) is not int or not 0 < number <= _MAX_COUNT:
            raise CheckpointError(f"{self.where}: {name} is {value!r:.80}, expected a number of columns.")
        return number

    @property
    def columns_rotated_together(self) -> int:
        """For a layer that is rotated in any case."""
        return self.count("convrot_groupsize", _ROTATED_TOGETHER)

    @property
    def rotation(self) -> int | None:
        """Columns that are rotated together; None for a layer that is not rotated."""
        return self.columns_rotated_together if self.fields.get("convrot") else None


def find_note(path: str, weight: StoredArray, beside: StoredArray | None, hints: Hints) -> Note | None:
    """The note of a module; None where there is none, it is empty, or the weight is plain floats.

    Args:
        path: of the module in the model.
        weight: its weight.
        beside: its array `comfy_quant`.
        hints: has the header's metadata.
    Errors: CheckpointError for a note that cannot be read, and for a weight that needs one and has none while others
        have.
    """
    where = f"{weight.file.name}: {weight.key}"
    text = beside.read_bytes(_MAX_JSON_BYTES).strip(_EMPTY) if beside else b""
    if weight.dtype in FLOATS:
        if text or _header_note(path, weight, hints):
            hints.notices[f"{weight.file.name}: a note (comfy_quant) on plain floats, which are read as floats"] += 1
        return None
    fields = parse_json_object(text, f"{where}: comfy_quant") if text else _header_note(path, weight, hints)
    if fields is None:
        return None
    params = fields.get("params")
    fields = {**params, **fields} if isinstance(params, dict) else fields
    name = fields.get("format")
    if name is None and weight.dtype == "I8" and ("convrot" in fields or "per_row" in fields):
        name = _INT8  # ComfyUI-INT8-Fast wrote no format until 2026
    if not isinstance(name, str):
        raise CheckpointError(f"{where}: ComfyUI's note is {fields!r:.200}, expected the name of a format in it.")
    return Note(name, fields, where)


def _header_note(path: str, weight: StoredArray, hints: Hints) -> dict[str, Any] | None:
    """The header's note: under the layer's own path, else under the only path with the same end."""
    metadata = hints.metadata.get("_quantization_metadata")
    layers = _layers(metadata)
    note = layers.get(weight.key.removesuffix(".weight")) or _by_end(metadata).get(path)
    if note is None and layers and weight.dtype == "I8":
        raise CheckpointError(
            f"{weight.file.name}: {weight.key} is I8 and has no entry in _quantization_metadata of the header, which "
            f"has {len(layers):,} others. Take another file of this model."
        )
    return note


@lru_cache(maxsize=4)
def _layers(metadata: str | None) -> dict[str, dict[str, Any]]:
    """The header's notes, by the path that each has there."""
    if metadata is None:
        return {}
    layers = parse_json_object(metadata, "_quantization_metadata").get("layers", {})
    if not isinstance(layers, dict):
        raise CheckpointError(f"_quantization_metadata: layers is {layers!r:.80}, expected an object.")
    return {path: note if isinstance(note, dict) else {"format": note} for path, note in layers.items()}


@lru_cache(maxsize=4)
def _by_end(metadata: str | None) -> dict[str, dict[str, Any] | None]:
    """The header's notes by path, from `layers.` or `embed_tokens` on; None where several differ.

    Some converters leave the prefix of the tensors' names out, or write another.
    """
    ends: dict[str, dict[str, Any] | None] = {}
    for path, note in _layers(metadata).items():
        start = max(path.rfind("layers."), path.rfind("embed_tokens"), 0)
        ends[path[start:]] = note if ends.get(path[start:], note) == note else None
    return ends
