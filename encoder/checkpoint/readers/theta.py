"""The config of a checkpoint without one: dims from the tensors' shapes, rope_theta from whatever else there is to see.

This collects what there is to see; tensors/rope_theta.py judges it.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import CONFIG_FILE, PIPELINE_FILE, TEXT_ENCODER_FOLDERS
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.dims import config_from_shapes
from encoder.checkpoint.tensors.families import QWEN3_THETA
from encoder.checkpoint.tensors.inv_freq import theta_from_frequencies
from encoder.checkpoint.tensors.rope_theta import Evidence, RopeTheta, component_of, find_rope_theta
from encoder.checkpoint.tensors.weights import StoredArray, StoredTensor
from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

_FOLDERS = 2  # above a file, whose names may say what it is
_MAX_SIBLINGS = 1000
_TRANSFORMER = "transformer"


def config_from_tensors(
    where: Path,
    arrays: Iterable[StoredArray],
    tensors: Mapping[str, StoredTensor],
    prefix: str,
    metadata: Mapping[str, Any],
    request: Request,
) -> tuple[Qwen3Config, RopeTheta]:
    """The config of a checkpoint without one, and how its rope_theta is known.

    Args:
        where: the file or folder.
        arrays: all in its files, which may hold other models.
        tensors: the encoder's, by parameter name.
        prefix: of the encoder's keys.
        metadata: of the files' headers.
        request: that the checkpoint answers.
    Errors: CheckpointError for tensors that are no Qwen3's, and one that names --rope-theta where nothing says it.
    """
    shapes = config_from_shapes(tensors, str(where), QWEN3_THETA)  # whose theta is not used
    theta = find_rope_theta(_evidence(where, arrays, prefix, metadata, shapes, request))
    return config_from_shapes(tensors, str(where), theta.value), theta


def _evidence(
    where: Path,
    arrays: Iterable[StoredArray],
    prefix: str,
    metadata: Mapping[str, Any],
    shapes: Qwen3Config,
    request: Request,
) -> Evidence:
    own, given = component_of(prefix), request.options.rope_theta
    arrays = [array for array in arrays if component_of(array.key) in (None, own)]
    return Evidence(
        where=str(where),
        given=given,
        frequencies=theta_from_frequencies(arrays, shapes.head_dim) if given is None else None,
        keys=[array.key for array in arrays],
        metadata={key: value for key, value in metadata.items() if isinstance(value, str)},
        names=_names(where, request),
        classes=list(_classes(_pipeline(where))),
        siblings=list(_siblings(where)),
        hidden_size=shapes.hidden_size,
        intermediate_size=shapes.intermediate_size,
        vocab_size=shapes.vocab_size,
    )


def _names(where: Path, request: Request) -> list[str]:
    """Of the file or folder itself, of some folders above it, and of the model as the user named it."""
    path = where.absolute()
    above = [folder.name for folder in path.parents[:_FOLDERS]]
    return [path.name, *above, *([] if request.source == request.name else [request.name])]


def _pipeline(where: Path) -> Path:
    """The folder of the pipeline that a text encoder belongs to; its own folder where it belongs to none."""
    folder = where if where.is_dir() else where.parent
    return folder.parent if folder.name in TEXT_ENCODER_FOLDERS else folder


def _classes(pipeline: Path) -> Iterator[str]:
    """The classes of the pipeline and of its transformer, and of the text encoder."""
    for file in (pipeline / PIPELINE_FILE, pipeline / _TRANSFORMER / CONFIG_FILE):
        config = _read_if_readable(file)
        encoder = config.get(TEXT_ENCODER_FOLDERS[0])
        names = [config.get("_class_name"), *(encoder if isinstance(encoder, list) else [])]
        yield from (name for name in names if isinstance(name, str))


def _read_if_readable(file: Path) -> dict[str, Any]:
    """Beside a model lie files that need not be in order for it to be served."""
    try:
        return read_json_object(file) if file.is_file() else {}
    except CheckpointError:
        return {}


def _siblings(where: Path) -> Iterator[str]:
    """What lies in a folder with its text encoder, as paths. Beside a single file lies whatever the user put there."""
    if not where.is_dir():
        return
    pipeline = _pipeline(where)
    yield from {*_entries(where), *_entries(pipeline)}
    yield from (f"{_TRANSFORMER}/{name}" for name in _entries(pipeline / _TRANSFORMER))


def _entries(folder: Path) -> list[str]:
    """The names in a folder; none where it is not there or may not be read."""
    try:
        return [path.name for path in islice(folder.iterdir(), _MAX_SIBLINGS)]
    except OSError:
        return []
