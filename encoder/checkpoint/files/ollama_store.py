"""Ollama's store on disk: from a model's name to its manifest, and from there to the blobs. Reads no tensor.

    manifests/{host}/{namespace}/{name}/{tag}    JSON; lists layers, each with a digest
    blobs/sha256-{64 hex digits}                 a layer; the digits are the hash of its bytes

Names and digests are checked before they become paths, because they come from outside.
Source: ollama, x/imagegen/manifest/manifest.go, types/model/name.go.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.checkpoint.files.json_file import read_json_object
from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.regular_file import open_file

DEFAULT_HOST, DEFAULT_NAMESPACE, DEFAULT_TAG = "registry.ollama.ai", "library", "latest"
TENSOR = "application/vnd.ollama.image.tensor"
JSON = "application/vnd.ollama.image.json"
GGUF = "application/vnd.ollama.image.model"
ADAPTER = "application/vnd.ollama.image.adapter"  # a LoRA, in GGUF

_HOST = re.compile(r"\w[\w.:-]{0,349}", re.ASCII)
_PART = re.compile(r"\w[\w.-]{0,79}", re.ASCII)  # no slash, and no dot in front: nothing that leads elsewhere
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_HASHED_AT_ONCE = 2**20  # bytes; larger blobs are hashed when they are loaded, not when they are opened


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a model.

    Attributes:
        media_type: kind of content: `TENSOR`, `JSON`, `GGUF`, `ADAPTER`, or another.
        name: within the model, e.g. `text_encoder/config.json`; empty where the layer has none.
        blob: the file. It exists, and has the size that the manifest says.
    """

    media_type: str
    name: str
    blob: Path


def store() -> Path:
    """The folder of the store: `$OLLAMA_MODELS`, or `~/.ollama/models`."""
    return Path(os.environ.get("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models"))


def manifest_file(name: str) -> Path | None:
    """Path of a model's manifest, whether it exists or not; None for a name that no model can have.

    Args:
        name: `[[host/]namespace/]name[:tag]`.
    """
    path, _, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    parts = [*path.split("/"), last] if path else [last]
    if len(parts) > 3:
        return None
    host, namespace, model = [DEFAULT_HOST, DEFAULT_NAMESPACE, ""][: 3 - len(parts)] + parts
    tag = tag or DEFAULT_TAG
    if not _HOST.fullmatch(host) or not all(map(_PART.fullmatch, (namespace, model, tag))):
        return None
    return store() / "manifests" / host / namespace / model / tag


def read_layers(manifest: Path) -> list[Layer]:
    """The layers that a manifest lists. All their blobs exist.

    Errors: CheckpointError for a damaged manifest, and for a blob that is missing, cut off, or not as its digest says.
    """
    layers = read_json_object(manifest).get("layers")
    if not isinstance(layers, list) or not layers:
        raise CheckpointError(f"{manifest}: layers is no list, or empty. Pull the model again.")
    return [_layer(manifest, entry) for entry in layers]


def _layer(manifest: Path, entry: Any) -> Layer:
    fields = entry if isinstance(entry, dict) else {}
    digest, name = fields.get("digest"), fields.get("name") or ""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest) or not isinstance(name, str):
        raise CheckpointError(f"{manifest}: has a layer {shown(entry)}, expected a sha256 digest in it.")
    blob = store() / "blobs" / digest.replace(":", "-")
    size = blob.stat().st_size if blob.is_file() else None
    if size is None or size != fields.get("size"):
        found = "is missing" if size is None else f"has {size:,} bytes, expected {shown(fields.get('size'))}"
        raise CheckpointError(f"{manifest}: the blob {digest} of {name or 'a layer'} {found}. Pull the model again.")
    if size <= _MAX_HASHED_AT_ONCE:
        check_digest(blob)
    return Layer(str(fields.get("mediaType")), name, blob)


def check_digest(blob: Path) -> None:
    """Return when a blob has the hash that its name says. Errors: CheckpointError when it has another."""
    try:
        with open_file(blob) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{blob}: cannot be read: {error}") from error
    if blob.name != f"sha256-{found}":
        raise CheckpointError(f"{blob}: has the hash {found}, expected that of its name. Pull the model again.")
