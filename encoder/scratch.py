"""Writes files and folders so that they appear when they are complete, or not at all.

What is being written lies in a folder beside its place, and is moved there at the end. A process that is killed leaves
such a folder behind. It holds a lock on it for as long as it lives, so the next one knows whose folders to remove.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = ".qwen3-encoder-unfinished-"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, gone at the end, whatever happens. Those of killed processes go first.

    Errors: OSError if nothing can be written there.
    """
    remove_abandoned(parent)
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def move_into_place(made: Path, place: Path) -> None:
    """Let a file or folder take its place, after all of it is on the disk. Errors: OSError."""
    for path in [*made.rglob("*"), made] if made.is_dir() else [made]:
        _sync(path)
    os.replace(made, place)
    _sync(place.parent)


def remove_abandoned(parent: Path) -> None:
    """Remove what killed processes have left in a folder. What cannot be removed stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """A new folder and its lock. Between the two, another process may take the folder for an abandoned one."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system without locks: its abandoned folders stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
