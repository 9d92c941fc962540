"""A folder of results, one safetensors file each: an LRU cache bounded in bytes. Synchronous.

Several processes may share a folder. A rename puts each file in place whole, and each file carries its key and a
checksum: a file that is gone, cut off or foreign is a miss. A killed process leaves at most one unfinished file.
"""

import json
import os
import re
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load, save

from encoder.types import PromptEmbeds

BLOCK_BYTES = 4096  # allocation unit of most file systems
COUNT_EVERY = 1 / 16  # of the bound: after writing so much, count the folder again, as other processes write too
UNFINISHED = ".unfinished-"
UNFINISHED_S = 3600  # an unfinished file of that age is abandoned

_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class DamagedResult(Exception):
    """A file does not hold the result of its name."""


class StoredFile(NamedTuple):
    """A result in the folder: `used` in nanoseconds since 1970, `size` in bytes on disk."""

    used: int
    size: int
    path: Path


class ResultFolder:
    """Results by key. `read` is safe on any thread; call all other methods on one thread.

    Attributes:
        bytes, entries: of the folder as last counted, plus what this process has written since.
        evictions: by this process.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.bytes = 0
        self.entries = 0
        self.evictions = 0
        self._written = 0  # bytes, since the folder was counted

    def open(self) -> None:
        """Create the folder for this user alone, where it is missing, and count its files. Errors: OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_room(0)

    def read(self, key: str) -> PromptEmbeds | None:
        """The result of a key, or None. A damaged file is deleted.

        Errors: DamagedResult; OSError when the file is there and cannot be read.
        """
        file = self._file(key)
        try:
            data = _read_file(file, self.max_bytes)
        except FileNotFoundError:
            return None
        try:
            result = _parse(data, key)
        except Exception as error:  # a parser may raise anything for bytes that are not its own
            with suppress(OSError):
                file.unlink()
            raise DamagedResult(f"{file.name} was damaged and is deleted: {error}") from error
        self.touch([key])
        return result

    def touch(self, keys: Sequence[str]) -> None:
        """Mark results as the most recently used ones. Missing files and failures are ignored."""
        for key in keys:
            with suppress(OSError):
                os.utime(self._file(key))

    def write(self, key: str, result: PromptEmbeds) -> None:
        """Keep a result, in place of an older one. A result larger than the bound is not kept. Errors: OSError."""
        data = _dump(key, result)
        size = _on_disk(len(data))
        if size > self.max_bytes:
            return
        try:
            self._add(key, data, size)
        except FileNotFoundError:  # the folder has been deleted
            self.open()
            self._add(key, data, size)

    def _add(self, key: str, data: bytes, size: int) -> None:
        if self._written + size > self.max_bytes * COUNT_EVERY or self.bytes + size > self.max_bytes:
            self._make_room(size)
        handle, unfinished = tempfile.mkstemp(dir=self.path, prefix=UNFINISHED)  # readable by this user alone
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.replace(unfinished, self._file(key))
        except BaseException:  # whatever stops the write, an interrupt included, leave no file behind
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        self.bytes += size
        self.entries += 1
        self._written += size

    def _file(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Count the folder. Where `size` bytes do not fit, evict until they and some more do."""
        files = sorted(self._files())
        self.bytes, self.entries, self._written = sum(file.size for file in files), len(files), 0
        if self.bytes + size <= self.max_bytes:
            return
        for file in files:
            if self.bytes + size <= self.max_bytes * (1 - COUNT_EVERY):
                return
            file.path.unlink(missing_ok=True)
            self.bytes -= file.size
            self.entries -= 1
            self.evictions += 1

    def _files(self) -> Iterator[StoredFile]:
        """All results. Deletes abandoned unfinished files on the way, and ignores files of other names."""
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process has evicted it
                    if _NAME.fullmatch(entry.name):
                        facts = entry.stat()
                        yield StoredFile(facts.st_mtime_ns, _on_disk(facts.st_size), Path(entry.path))
                    elif entry.name.startswith(UNFINISHED) and entry.stat().st_mtime < time.time() - UNFINISHED_S:
                        os.unlink(entry.path)


def _read_file(file: Path, max_bytes: int) -> bytes:
    """All bytes of a file; none of what is no file, or larger than any result can be. Errors: OSError."""
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:  # not for a FIFO
        facts = os.fstat(stream.fileno())
        return stream.read() if stat.S_ISREG(facts.st_mode) and facts.st_size <= max_bytes else b""


def _on_disk(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _dump(key: str, result: PromptEmbeds) -> bytes:
    """As a safetensors file. bfloat16 is stored as its uint16 bit pattern, which NumPy can read."""
    tensors = {"hidden_states": result.hidden_states, "attention_mask": result.attention_mask}
    return save(tensors, {**_facts(key, result), "crc32": _checksum(key, result)})


def _parse(data: bytes, key: str) -> PromptEmbeds:
    """The result that `_dump` wrote. Errors: any, for other bytes."""
    tensors = load(data)  # the library checks the header before anything else looks at it
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header["__metadata__"]
    result = PromptEmbeds(
        tensors["hidden_states"], tensors["attention_mask"], metadata["dtype"], int(metadata["rows_axis"])
    )
    if metadata != {**_facts(key, result), "crc32": _checksum(key, result)}:
        raise ValueError(f"key or checksum differ: {metadata}")
    return result


def _facts(key: str, result: PromptEmbeds) -> dict[str, str]:
    return {"key": key, "dtype": result.dtype, "rows_axis": str(result.rows_axis)}


def _checksum(key: str, result: PromptEmbeds) -> str:
    """A checksum of the numbers and their description. It detects damage, not malice."""
    arrays: list[Any] = [result.hidden_states, result.attention_mask]
    described = [_facts(key, result), [(str(array.dtype), array.shape) for array in arrays]]
    checksum = zlib.crc32(json.dumps(described).encode())
    for array in arrays:
        checksum = zlib.crc32(array.reshape(-1).view("u1"), checksum)
    return f"{checksum:08x}"
