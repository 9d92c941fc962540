"""Fetches the files of a checkpoint from a Hugging Face hub: only those that the encoder needs, and none twice."""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path, PurePosixPath

import huggingface_hub  # imports its parts when they are first used; to import all of them takes 0.4 s

from encoder.checkpoint.files.gguf_parts import part_names
from encoder.checkpoint.files.hub_client import download, repository_sizes
from encoder.checkpoint.files.hub_id import HubId
from encoder.checkpoint.files.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    MERGES_FILE,
    MODEL_SUFFIXES,
    PIPELINE_FILE,
    QUANTIZATION_FILES,
    TEXT_ENCODER_FOLDERS,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDERS,
    VOCAB_FILE,
    WEIGHTS_FILE,
    find_layout,
    first_with_tokenizer,
    is_adapter_folder,
    read_index,
)
from encoder.checkpoint.files.transfer_log import log_transfer
from encoder.errors import CheckpointError

log = logging.getLogger(__name__)

_MAX_LISTED = 20

_MODEL_FOLDERS = ("", *(f"{name}/" for name in TEXT_ENCODER_FOLDERS))
_TOKENIZER_PLACES = (*_MODEL_FOLDERS, *(f"{name}/" for name in TOKENIZER_FOLDERS))
_SLOW_FILES = (VOCAB_FILE, MERGES_FILE)  # of a tokenizer: 4 MB that most repositories have beside tokenizer.json

# Of a single model and of a pipeline. A name that a repository does not have costs nothing.
_SMALL_FILES = (
    PIPELINE_FILE,
    *(
        f"{folder}{name}"
        for folder in _MODEL_FOLDERS
        for name in (CONFIG_FILE, *QUANTIZATION_FILES, INDEX_FILE, ADAPTER_CONFIG_FILE)
    ),
    *(f"{folder}{name}" for folder in _TOKENIZER_PLACES for name in TOKENIZER_FILES if name not in _SLOW_FILES),
)

_WITH_QWEN3_TOKENIZER = (
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Tongyi-MAI/Z-Image-Turbo",
    "black-forest-labs/FLUX.2-klein-4B",
    "black-forest-labs/FLUX.2-klein-9B",
)


def fetch(hub_id: HubId, cache_dir: Path | None, component: str | None = None) -> Path:
    """The cached snapshot of a repository, with all files that the encoder needs. Its name is the commit.

    Args:
        hub_id: of the repository.
        cache_dir: the hub's cache; None means its usual place.
        component: the folder of the text encoder in a pipeline; None looks for it.

    Errors: CheckpointError when the repository or its files cannot be had, or the disk has no room for them.
    """
    log.info("looking for %s in the cache and on the hub", hub_id.repository)
    snapshot, small_files = _fetch_small_files(hub_id, cache_dir, component)
    at_commit = replace(hub_id, revision=snapshot.name)  # else a push between the two downloads would mix two revisions
    if is_adapter_folder(snapshot / hub_id.path):
        return snapshot
    names = part_names(hub_id.path) if hub_id.is_file else _weight_files(snapshot, hub_id.path, component)
    missing = [name for name in names if not (snapshot / name).exists()]
    if not missing:
        return snapshot
    sizes = repository_sizes(at_commit)
    _check_weights_exist(at_commit, missing, sizes)
    total = sum(sizes.get(name, 0) for name in missing)
    _check_disk(at_commit, total, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    on_terminal = sys.stderr.isatty()  # where huggingface_hub shows progress bars of its own
    with nullcontext() if on_terminal else log_transfer(hub_id.repository, blobs, total):
        return download(at_commit, cache_dir, [*small_files, *names])


def fetch_tokenizer(name: str, cache_dir: Path | None) -> Path | None:
    """The folder of a repository's tokenizer, fetched where it is not in the cache; None if `name` is no hub id."""
    hub_id = HubId.parse(name)
    if hub_id is None:
        return None
    snapshot, _ = _fetch_small_files(hub_id, cache_dir)
    folder = snapshot / hub_id.path
    candidates = [folder, *(folder / inner for inner in (*TOKENIZER_FOLDERS, *TEXT_ENCODER_FOLDERS))]
    return first_with_tokenizer(candidates) or folder


def fetch_adapter(name: str, cache_dir: Path | None) -> Path | None:
    """The folder or file of an adapter in a repository, fetched where it is not cached; None if `name` is no hub id."""
    hub_id = HubId.parse(name)
    if hub_id is None:
        return None
    path = PurePosixPath(hub_id.path)
    folder = path.parent if hub_id.is_file else path
    names = [str(folder / file) for file in (ADAPTER_CONFIG_FILE, *ADAPTER_FILES)]
    found = download(hub_id, cache_dir, [*names, hub_id.path] if hub_id.is_file else names) / path
    if not found.exists():
        wanted = path.name if hub_id.is_file else ADAPTER_FILES[0]
        raise CheckpointError(f"{name}: has no {wanted}. Name a file: {hub_id.repository}/file.safetensors.")
    return found


def fetch_qwen3_tokenizer(cache_dir: Path | None) -> Path:
    """The folder of Qwen3's tokenizer: from any repository in the cache that has it, else from the hub."""
    for repository in _WITH_QWEN3_TOKENIZER:
        for name in (TOKENIZER_FILE, f"tokenizer/{TOKENIZER_FILE}"):
            cached = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache_dir)
            if isinstance(cached, str):
                return Path(cached).parent
    folder = fetch_tokenizer(_WITH_QWEN3_TOKENIZER[0], cache_dir)
    assert folder is not None
    return folder


def _fetch_small_files(hub_id: HubId, cache_dir: Path | None, component: str | None = None) -> tuple[Path, list[str]]:
    """The snapshot with all small files, and their names; a slow tokenizer's files where there is no tokenizer.json."""
    names = _in_folders(hub_id, component, _SMALL_FILES)
    snapshot = download(hub_id, cache_dir, names)
    if any((snapshot / name).exists() for name in names if PurePosixPath(name).name == TOKENIZER_FILE):
        return snapshot, names
    slow = [f"{place}{name}" for place in _TOKENIZER_PLACES for name in _SLOW_FILES]
    names += _in_folders(hub_id, component, slow)
    return download(replace(hub_id, revision=snapshot.name), cache_dir, names), names


def _in_folders(hub_id: HubId, component: str | None, names: Sequence[str]) -> list[str]:
    """These names at the root, in the folder that the id names, in the one above and in the component."""
    path = PurePosixPath(hub_id.path)
    folders = {PurePosixPath("."), path, path.parent}
    if component is not None and component == PurePosixPath(component).name:
        folders.add(path / component)
    return [str(folder / name) for folder in sorted(folders) for name in names]


def _weight_files(snapshot: Path, path: str, component: str | None) -> list[str]:
    """Names in the repository of the files that hold the encoder's tensors."""
    layout = find_layout(snapshot / path, component)
    folder = layout.text_encoder
    index = folder / INDEX_FILE
    names = sorted(set(read_index(index, layout.component).values())) if index.is_file() else [WEIGHTS_FILE]
    return [str(PurePosixPath(folder.relative_to(snapshot).as_posix()) / name) for name in names]


def _check_weights_exist(hub_id: HubId, names: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Errors: CheckpointError when a repository has checkpoints in single files, and the id names none of them."""
    others = [path for path in sorted(sizes) if path.endswith(MODEL_SUFFIXES) and part_names(path)[0] == path]
    if not hub_id.is_file and others and not sizes.keys() & names:
        raise CheckpointError(
            f"{hub_id.repository}: has no {names[0]}. Name one of its files: "
            f"{', '.join(f'{hub_id.repository}/{path}' for path in others[:_MAX_LISTED])}."
        )


def _check_disk(hub_id: HubId, needed: int, snapshot: Path) -> None:
    """Errors: CheckpointError when the disk of the cache has less than `needed` bytes."""
    # The folder of a snapshot that has none of the small files does not exist yet.
    free = shutil.disk_usage(next(folder for folder in snapshot.parents if folder.is_dir())).free
    if needed > free:
        raise CheckpointError(
            f"{hub_id.repository}: {needed / 1e9:.1f} GB must be fetched, and {free / 1e9:.1f} GB are free in "
            f"{snapshot.parents[2]}. Make room, or set another folder with --cache-dir or HF_HOME."
        )
