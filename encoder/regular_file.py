"""Opens the files of strangers: regular ones only, and never more of one than a file of its kind can need.

Opening a pipe waits for somebody who writes to it, and reading a device never ends.
"""

import errno
import io
import os
import stat
from pathlib import Path


class UnfitFile(OSError):
    """What is there is no regular file, or is larger than a file of its kind can be. `strerror` says so in words."""

    def __init__(self, file: Path, found: str) -> None:
        super().__init__(errno.EINVAL, found, str(file))


class RegularFile(io.BufferedReader):
    """An open file. What the kernel writes, as some files in /proc, may have nothing to read and never an end."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Errors: UnfitFile where `read` would wait."""
        content: bytes | None = super().read(size)
        if content is None:
            raise UnfitFile(Path(self.name), "has nothing to read now, expected a file with an end")
        return content


def open_file(file: Path) -> RegularFile:
    """The file, open for reading. Waits for nobody.

    Errors: UnfitFile, and OSError as `open` raises it.
    """
    try:
        stream = RegularFile(io.FileIO(file, opener=_open_nonblocking))
    except IsADirectoryError as error:
        raise UnfitFile(file, "is a folder, expected a file") from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket cannot be opened at all
            raise UnfitFile(file, "is a socket, expected a file") from error
        raise
    mode = os.fstat(stream.fileno()).st_mode
    if not stat.S_ISREG(mode):
        stream.close()
        raise UnfitFile(file, f"is {'a pipe' if stat.S_ISFIFO(mode) else 'a device'}, expected a file")
    return stream


def _open_nonblocking(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(file: Path, max_bytes: int) -> bytes:
    """All bytes of the file. Errors: UnfitFile for more than `max_bytes`, and as of `open_file`."""
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(content)) > max_bytes:  # the size of what the kernel writes, as in /proc, is 0
        raise UnfitFile(file, f"is {max(size, len(content)):,} bytes, expected at most {max_bytes:,}")
    return content
