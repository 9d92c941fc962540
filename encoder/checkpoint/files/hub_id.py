"""What users name a model on a Hugging Face hub by: its id, or an address that they have copied. Fetches nothing."""

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from encoder.checkpoint.files.layout import MODEL_SUFFIXES

HOSTS = frozenset({"huggingface.co", "hf.co", "hf-mirror.com"})  # and that of HF_ENDPOINT

_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?P<path>(/\w[\w.-]*)*)(@(?P<revision>[\w./-]+))?", re.ASCII)

# A page or a file on the web; `hf://`, as huggingface_hub's file system writes it; without a scheme; as git clones it.
_ADDRESS = re.compile(
    r"(https?://(?P<host>[^/]+)/|hf://(models/)?|(www\.)?(huggingface\.co|hf\.co)/|git@(huggingface\.co|hf\.co):)"
    r"(?P<place>[^?#]+)([?#].*)?"
)
_PLACE = re.compile(
    r"(?P<repository>[^/@]+/[^/@]+?)(\.git)?(@(?P<tag>[^/]+))?"
    r"(/(tree|blob|resolve|raw)/(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(?P<path>/.*)?"
)


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the hub, or a folder or a file in it, at a revision.

    Attributes:
        repository: `organization/name`.
        path: of a folder or a file in the repository, "" for its root.
        revision: branch, tag or commit; None means the default branch.
    """

    repository: str
    path: str
    revision: str | None

    @classmethod
    def parse(cls, source: str) -> "HubId | None":
        """From `organization/name[/path][@revision]`, or an address of it; None for anything else."""
        source = source.strip()
        address = _ADDRESS.fullmatch(source)
        match = _ID.fullmatch((source if address is None else _id_at(address)).rstrip("/"))
        return cls(match["repository"], match["path"].removeprefix("/"), match["revision"]) if match else None

    @property
    def is_file(self) -> bool:
        """Whether the path is that of a checkpoint in a single file."""
        return self.path.endswith(MODEL_SUFFIXES)


def _id_at(address: re.Match[str]) -> str:
    """The id of what is at an address; "" for another host, and for a page that is not one of files."""
    host, place = address["host"], _PLACE.fullmatch(address["place"].rstrip("/"))
    if place is None or place["repository"].startswith(("datasets/", "spaces/")) or (host and not _is_hub(host)):
        return ""
    revision, path = place["revision"] or place["tag"], place["path"] or ""
    if host and path and not revision:  # a page of discussions, say
        return ""
    return unquote(place["repository"] + path.rstrip("/") + (f"@{revision}" if revision else ""))


def _is_hub(host: str) -> bool:
    host = host.lower().removeprefix("www.")
    return host in HOSTS or host == urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
