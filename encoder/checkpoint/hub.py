"""Fetches a checkpoint from a Hugging Face hub: only the files that the encoder needs, and none twice.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME work as everywhere, since huggingface_hub reads them.
"""

import logging
import re
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE, find_layout, open_folder, read_index
from encoder.checkpoint.reader import Request
from encoder.checkpoint.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from encoder.errors import CheckpointError

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)

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


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like `organization/name` or `organization/name@revision`."""
    return _HUB_ID.fullmatch(source) is not None


def recognizes(request: Request) -> bool:
    """Anything that looks like a hub id; asked last, since a folder may look like one too."""
    return is_hub_id(request.source)


def open_request(request: Request) -> Checkpoint:
    """Describe a checkpoint on the hub, after fetching what is not in the cache yet.

    Errors: CheckpointError when the repository cannot be had, or is no Qwen3 checkpoint.
    """
    match = _HUB_ID.fullmatch(request.source)
    assert match is not None
    if request.revision and match["revision"] and request.revision != match["revision"]:
        raise CheckpointError(
            f"{request.source}: names one revision and {request.revision!r} is another. Give one of them."
        )
    revision = request.revision or match["revision"]
    folder = fetch(match["repository"], revision=revision, cache_dir=request.cache_dir)
    return open_folder(folder, request, revision=folder.name)


def fetch_tokenizer(hub_id: str, cache_dir: Path | None) -> Path:
    """The folder of a repository's tokenizer, fetched where it is not in the cache."""
    match = _HUB_ID.fullmatch(hub_id)
    assert match is not None
    return find_layout(_snapshot(match["repository"], match["revision"], cache_dir, _SMALL_FILES)).tokenizer


def fetch_qwen3_tokenizer(cache_dir: Path | None) -> Path:
    """The folder of Qwen3's tokenizer: from any repository in the cache that has it, else from the hub."""
    for repository in _WITH_QWEN3_TOKENIZER:
        for name in (TOKENIZER_FILE, f"tokenizer/{TOKENIZER_FILE}"):
            cached = try_to_load_from_cache(repository, name, cache_dir=cache_dir)
            if isinstance(cached, str):
                return Path(cached).parent
    return fetch_tokenizer(_WITH_QWEN3_TOKENIZER[0], cache_dir)


def fetch(repository: str, *, revision: str | None, cache_dir: Path | None) -> Path:
    """The cached snapshot of `repository` with all files that the encoder needs; its name is the commit."""
    log.info("looking for %s in the cache and on the hub", repository)
    folder = _snapshot(repository, revision, cache_dir, _SMALL_FILES)
    text_encoder = find_layout(folder).text_encoder
    prefix = "" if text_encoder == folder else "text_encoder/"
    index = text_encoder / INDEX_FILE
    names = sorted(set(read_index(index).values())) if index.is_file() else [SINGLE_FILE]
    # From here on by commit, so that a push in between cannot mix two revisions.
    return _snapshot(repository, folder.name, cache_dir, _SMALL_FILES + [prefix + name for name in names])


def _snapshot(repository: str, revision: str | None, cache_dir: Path | None, names: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=names))
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
            f"{repository}: has no revision {revision!r}. Name a branch, a tag or a commit."
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
