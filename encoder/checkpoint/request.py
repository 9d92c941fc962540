"""What a reader is asked to open."""

import os
from dataclasses import dataclass
from pathlib import Path

from encoder.options import ModelOptions


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
        """The source as a path in the file system, whether it exists or not."""
        return Path(os.path.expanduser(self.source))

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder that exists."""
        return bool(self.source) and os.path.isdir(self.path)  # Path.is_dir raises for names that are too long

    def is_file(self, suffix: str) -> bool:
        """Whether the source is a file that exists and ends in `suffix`, in lower or upper case."""
        return self.path.suffix.lower() == suffix and os.path.isfile(self.path)
