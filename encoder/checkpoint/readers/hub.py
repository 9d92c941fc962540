"""Fetches a checkpoint from a Hugging Face hub: only the files that the encoder needs, and none twice.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME work as everywhere, since huggingface_hub reads them.
"""

import glob
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import huggingface_hub  # which imports what it needs when it is asked for: all of it takes 0.4 s
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.files.gguf_parts import part_names
from encoder.checkpoint.files.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, first_with_tokenizer
from encoder.checkpoint.files.transfer_log import log_transfer
from encoder.checkpoint.readers.formats import open_path
from encoder.checkpoint.readers.huggingface import INDEX_FILE, SINGLE_FILE, find_layout, read_index
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?P<path>(/\w[\w.-]*)*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".gguf")
_LISTED = 20

# Of a plain checkpoint and of a pipeline; names that a repository does not have do no harm.
_SMALL_FILES = [
    "model_index.json",
    *(f"{folder}{name}" for folder in ("", "text_encoder/") for name in ("config.json", INDEX_FILE)),
    *(
        f"{folder}{name}"
        for folder in ("", "text_encoder/", "tokenizer/", "processor/")
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
    ),
]

_WITH_QWEN3_TOKENIZER = (
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Tongyi-MAI/Z-Image-Turbo",
    "black-forest-labs/FLUX.2-klein-4B",
    "black-forest-labs/FLUX.2-klein-9B",
)


@dataclass(frozen=True, slots=True)
class HubId:
    """`organization/name`, perhaps with a folder or file in it, and a revision.

    Attributes:
        repository: `organization/name`.
        path: of a folder or a file in the repository, "" for its root.
        revision: branch, tag or commit; None means the default branch.
    """

    repository: str
    path: str
    revision: str | None

    @property
    def is_file(self) -> bool:
        """Whether a single file is meant."""
        return self.path.endswith(_FILE_SUFFIXES)


def parse_hub_id(source: str) -> HubId | None:
    """`organization/name[/path][@revision]`, None for anything else."""
    match = _HUB_ID.fullmatch(source)
    return HubId(match["repository"], match["path"].removeprefix("/"), match["revision"]) if match else None


def recognizes(request: Request) -> bool:
    """Anything that looks like a hub id; asked last, since a folder may look like one too."""
    return parse_hub_id(request.source) is not None


def open_request(request: Request) -> Checkpoint:
    """Describe a checkpoint on the hub, after fetching what is not in the cache yet.

    Errors: CheckpointError when the repository cannot be had, or is no Qwen3 checkpoint.
    """
    hub_id = parse_hub_id(request.source)
    assert hub_id is not None
    revision = request.options.revision
    if revision and hub_id.revision and revision != hub_id.revision:
        raise CheckpointError(f"{request.source}: names one revision and {revision!r} is another. Give one of them.")
    snapshot = fetch(replace(hub_id, revision=revision or hub_id.revision), request.options.cache_dir)
    checkpoint = open_path(snapshot / hub_id.path, request)
    return replace(checkpoint, revision=snapshot.name)


def fetch(hub_id: HubId, cache_dir: Path | None) -> Path:
    """The cached snapshot of a repository with all files that the encoder needs; its name is the commit."""
    log.info("looking for %s in the cache and on the hub", hub_id.repository)
    small_files = _small_files(hub_id)
    snapshot = _snapshot(hub_id, cache_dir, small_files)
    at_commit = replace(hub_id, revision=snapshot.name)  # so that a push in between cannot mix two revisions
    names = part_names(hub_id.path) if hub_id.is_file else _weight_files(snapshot, hub_id.path)
    missing = [name for name in names if not (snapshot / name).exists()]
    if not missing:
        return snapshot
    total = _check_disk(at_commit, missing, snapshot)
    blobs = snapshot.parent.parent / "blobs"
    on_terminal = sys.stderr.isatty()  # where huggingface_hub shows bars of its own
    with nullcontext() if on_terminal else log_transfer(hub_id.repository, blobs, total):
        return _snapshot(at_commit, cache_dir, small_files + names)


def fetch_tokenizer(name: str, cache_dir: Path | None) -> Path | None:
    """The folder of a repository's tokenizer, fetched where it is not in the cache; None for what is no hub id."""
    hub_id = parse_hub_id(name)
    if hub_id is None:
        return None
    folder = _snapshot(hub_id, cache_dir, _small_files(hub_id)) / hub_id.path
    candidates = [folder, *(folder / inner for inner in ("tokenizer", "processor", "text_encoder"))]
    return first_with_tokenizer(candidates) or folder


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


def _small_files(hub_id: HubId) -> list[str]:
    """At the root, in the folder that is meant, and in the one above it."""
    path = PurePosixPath(hub_id.path)
    folders = {PurePosixPath("."), path, path.parent}
    return [str(folder / name) for folder in sorted(folders) for name in _SMALL_FILES]


def _weight_files(snapshot: Path, path: str) -> list[str]:
    """Names in the repository of the files that hold the encoder's tensors."""
    folder = find_layout(snapshot / path).text_encoder
    index = folder / INDEX_FILE
    names = sorted(set(read_index(index).values())) if index.is_file() else [SINGLE_FILE]
    return [str(PurePosixPath(folder.relative_to(snapshot).as_posix()) / name) for name in names]


def _check_disk(hub_id: HubId, names: Sequence[str], snapshot: Path) -> int:
    """The bytes that the files take.

    Errors: CheckpointError when the disk of the cache has less, or the repository has others only.
    """
    with _explained(hub_id):
        entries = huggingface_hub.HfApi().list_repo_tree(hub_id.repository, revision=hub_id.revision, recursive=True)
        sizes = {entry.path: getattr(entry, "size", 0) for entry in entries}
    others = [path for path in sorted(sizes) if path.endswith(_FILE_SUFFIXES) and part_names(path)[0] == path]
    if not hub_id.is_file and others and not sizes.keys() & names:
        raise CheckpointError(
            f"{hub_id.repository}: has no {names[0]}. Name one of its files: "
            f"{', '.join(f'{hub_id.repository}/{path}' for path in others[:_LISTED])}."
        )
    needed = sum(sizes.get(name, 0) for name in names)
    # Where a repository has none of the small files, its folder does not exist yet.
    free = shutil.disk_usage(next(folder for folder in snapshot.parents if folder.is_dir())).free
    if needed > free:
        raise CheckpointError(
            f"{hub_id.repository}: {needed / 1e9:.1f} GB must be fetched, and {free / 1e9:.1f} GB are free in "
            f"{snapshot.parents[2]}. Make room, or set another folder with --cache-dir or HF_HOME."
        )
    return needed


def _snapshot(hub_id: HubId, cache_dir: Path | None, names: Sequence[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    with _explained(hub_id):
        return Path(
            huggingface_hub.snapshot_download(
                hub_id.repository, revision=hub_id.revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )


@contextmanager
def _explained(hub_id: HubId) -> Iterator[None]:
    """Turns the client's errors into a CheckpointError that says what to do about each."""
    repository = hub_id.repository
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: is gated. Accept its terms on its hub page, and set HF_TOKEN to a token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: neither a folder here nor a repository on the hub that can be seen without logging in. "
            f"Check the spelling; for a private one, set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository}: has no revision {hub_id.revision!r}. Name a branch, a tag or a commit."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: is not complete in the cache, and the hub cannot be reached. Connect once (unset "
            f"HF_HUB_OFFLINE where it is set), or give the folder of a copy. Cause: {error}"
        ) from error
    except Exception as error:  # full disk, broken transfer: the HTTP library, and so its errors, vary with the version
        raise CheckpointError(
            f"{repository}: fetching it failed, start again to resume. Cause: {error or type(error).__name__}"
        ) from error
