"""What a reader is: a module of this folder with two functions, listed in `registry.READERS`."""

from typing import Protocol

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.request import Request


class Reader(Protocol):
    """Recognizes checkpoints of one format, and describes them.

    A module whose two functions have these signatures is a Reader; it needs no class.
    """

    def recognizes(self, request: Request) -> bool:
        """Whether `request.source` is of this format.

        Looks at names, and at whether a file or folder of that name exists. Opens nothing, and raises nothing.
        """

    def open_request(self, request: Request) -> Checkpoint:
        """The checkpoint at `request.source`, as `checkpoint.describe` makes it.

        Reads headers and small files, no tensor. Called only where `recognizes` is True.

        Errors: CheckpointError for whatever is wrong with the files. An OSError is turned into one by the registry.
        """
