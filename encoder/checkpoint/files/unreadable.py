"""The error for a file that is there, and that the system does not let this process read."""

import os
from pathlib import Path

from encoder.errors import CheckpointError
from encoder.regular_file import UnfitFile


def unreadable(file: Path, error: OSError) -> CheckpointError:
    """Says what the system said, and what to do: safetensors' writer lets nobody but its user read a file."""
    if isinstance(error, UnfitFile):
        return CheckpointError(f"{file}: {error.strerror}. Fetch the model again.")
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{file}: cannot be read by the user with the id {os.geteuid()}: {error.strerror}. Let all read it, with "
            f"chmod a+r on the file and a+rx on its folders."
        )
    return CheckpointError(f"{file}: cannot be read: {error.strerror or error}. Is its disk or its share in order?")
