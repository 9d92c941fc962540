"""Asks a Hugging Face hub for files, by huggingface_hub: mirrors that serve less, and what each failure means.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME have their usual meaning: huggingface_hub reads them.
"""

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import huggingface_hub  # imports its parts when they are first used; to import all of them takes 0.4 s
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from encoder.checkpoint.files.hub_id import HubId
from encoder.errors import CheckpointError
from encoder.messages import said

log = logging.getLogger(__name__)

_OFFICIAL = "https://huggingface.co"
_NOT_SERVED = (404, 405, 501)  # statuses of a route that a mirror does not have


def download(hub_id: HubId, cache_dir: Path | None, names: Sequence[str]) -> Path:
    """The snapshot of a repository, with those of the named files that it has.

    Args:
        hub_id: of the repository; its path is not heeded.
        cache_dir: the hub's cache; None means its usual place.
        names: of files, from the repository's root.
    Errors: CheckpointError when the repository or a file cannot be had.
    """
    with _as_checkpoint_errors(hub_id):
        if not _serves_tree(hub_id.repository):
            return _download_singly(hub_id, cache_dir, names)
        patterns = [glob.escape(name) for name in names]
        return Path(
            huggingface_hub.snapshot_download(
                hub_id.repository, revision=hub_id.revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )


def _download_singly(hub_id: HubId, cache_dir: Path | None, names: Sequence[str]) -> Path:
    """The same as `download` from a hub that serves files and their names alone."""
    commit, listed = _listed(hub_id)
    for name in dict.fromkeys(names):
        if name in listed:
            huggingface_hub.hf_hub_download(hub_id.repository, name, revision=hub_id.revision, cache_dir=cache_dir)
    folder = f"models--{hub_id.repository.replace('/', '--')}"
    return Path(cache_dir or constants.HF_HUB_CACHE) / folder / "snapshots" / commit


def repository_sizes(hub_id: HubId) -> dict[str, int]:
    """The size in bytes of every file of a repository, by name; 0 where the hub does not say. Errors: as `download`."""
    with _as_checkpoint_errors(hub_id):
        if _serves_tree(hub_id.repository):
            hub = huggingface_hub.HfApi()
            entries = hub.list_repo_tree(hub_id.repository, revision=hub_id.revision, recursive=True)
            return {entry.path: getattr(entry, "size", 0) for entry in entries}
        log.warning(
            "%s: this hub does not say how large its files are, so free space is not checked", hub_id.repository
        )
        return dict.fromkeys(_listed(hub_id)[1], 0)


@cache
def _serves_tree(repository: str) -> bool:
    """Whether the hub lists files with their sizes, for which huggingface_hub asks. Mirrors need not."""
    if constants.ENDPOINT == _OFFICIAL:
        return True
    hub = huggingface_hub.HfApi()
    try:
        hub.model_info(repository)  # fails at once where nothing can be reached, while the next tries for half a minute
        next(iter(hub.list_repo_tree(repository)), None)
    except HfHubHTTPError as error:
        return error.response.status_code not in _NOT_SERVED
    except Exception:  # noqa: BLE001  # offline, say: what is wrong shows when files are fetched
        return True
    return True


def _listed(hub_id: HubId) -> tuple[str, list[str]]:
    """The commit of a revision, and the names of its files."""
    info = huggingface_hub.HfApi().model_info(hub_id.repository, revision=hub_id.revision)
    return info.sha or "", [sibling.rfilename for sibling in info.siblings or ()]


@contextmanager
def _as_checkpoint_errors(hub_id: HubId) -> Iterator[None]:
    """Turns each error of the hub's client into a CheckpointError that says what to do about it."""
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
            f"HF_HUB_OFFLINE where it is set), or give the folder of a copy.{_addresses()} Cause: {_cause(error)}"
        ) from error
    except Exception as error:  # full disk, broken transfer: the HTTP library, and so its errors, vary with the version
        raise CheckpointError(
            f"{repository}: fetching it failed, start again to resume.{_addresses()} Cause: {_cause(error)}"
        ) from error


def _cause(error: BaseException) -> str:
    """What the HTTP library says, without the queries and passwords of addresses: a signed address opens a file."""
    return re.sub(r"//[^/\s]*@", "//", re.sub(r"\?[^\s'\")]+", "?…", said(error)))


def _addresses() -> str:
    """A sentence on each variable of the environment that says how to reach the hub. A value may hold a password."""
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    proxies = f" {' and '.join(names)} must be like http://host:port or socks5://host:port." if names else ""
    return proxies + (" HF_ENDPOINT must be like https://host." if "HF_ENDPOINT" in os.environ else "")
