"""What a reader is asked to open."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from encoder.options import ModelOptions
from encoder.regular_file import open_file

_SUFFIXES = (".safetensors", ".gguf")  # of files whose name says the format
_MAX_HEADER_BYTES = 2**32  # far above any; text has larger numbers in its first eight bytes


@dataclass(frozen=True, slots=True)
class Request:
    """One source to open.

    Attributes:
        source: `options.model`; after a download, the path of what was fetched.
        options: as the user gave them.
    """

    source: str
    options: ModelOptions

    @property
    def name(self) -> str:
        """The model as the user named it: for messages, and the name of the checkpoint."""
        return self.options.model

    @property
    def path(self) -> Path:
        """The source as a path in the file system, whether it exists or not. `file://` URLs are paths."""
        scheme, separator, place = self.source.partition("://")
        if scheme.lower() == "file" and separator:
            return Path(unquote(place.removeprefix("localhost")))
        return Path(os.path.expanduser(self.source))

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder that exists."""
        return bool(self.source) and os.path.isdir(self.path)  # Path.is_dir raises for names that are too long

    def is_file(self, suffix: str) -> bool:
        """Whether the source is a file that exists, and of the format that `suffix` stands for."""
        return os.path.isfile(self.path) and _format_of(self.path) == suffix


def _format_of(file: Path) -> str:
    """The suffix of the file's format: its own in lower case, or that of its content where the name has another.

    The hub's cache and Ollama's store keep blobs without a suffix, and ComfyUI takes `.sft` for `.safetensors`.
    """
    suffix = file.suffix.lower()
    if suffix in _SUFFIXES:
        return suffix
    with open_file(file) as stream:
        head = stream.read(9)
    if head.startswith(b"GGUF"):
        return ".gguf"
    # The length of the header, in eight bytes, and the header, which is JSON.
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_HEADER_BYTES
    return ".safetensors" if is_safetensors else suffix
