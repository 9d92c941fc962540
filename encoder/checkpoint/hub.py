"""Fetches a checkpoint from a Hugging Face hub: only the files that the encoder needs, and none twice.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME work as everywhere, since huggingface_hub reads them.
"""

import logging
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.huggingface import (
    INDEX_FILE,
    SINGLE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    find_layout,
    open_folder,
    read_index,
)
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


def is_hub_id(source: str) -> bool:
    """Whether `source` looks like `organization/name` or `organization/name@revision`."""
    return _HUB_ID.fullmatch(source) is not None


def open_repository(hub_id: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Checkpoint:
    """Describe a checkpoint on the hub, after fetching what is not in the cache yet.

    Args:
        hub_id: `organization/name` or `organization/name@revision`.
        revision: branch, tag or commit; None means the default branch.
        cache_dir: of huggingface_hub; None means its usual one.
    Errors: CheckpointError when the repository cannot be had, or is no Qwen3 checkpoint.
    """
    match = _HUB_ID.fullmatch(hub_id)
    assert match is not None
    if revision and match["revision"] and revision != match["revision"]:
        raise CheckpointError(f"{hub_id}: names one revision and {revision!r} is another. Give one of them.")
    folder = fetch(match["repository"], revision=revision or match["revision"], cache_dir=cache_dir)
    return open_folder(folder, name=hub_id, revision=folder.name)


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
