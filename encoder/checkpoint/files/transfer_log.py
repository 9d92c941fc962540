"""Logs the progress of a download where nobody sees a progress bar, as in a container or a service."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

EVERY_S = 5.0


@contextmanager
def log_transfer(name: str, folder: Path, total: int) -> Iterator[None]:
    """Log every few seconds how much of a download is on disk, until the block ends.

    Args:
        name: of the download, for the log.
        folder: the folder that it is written to; its growth is the progress.
        total: bytes to be fetched.
    """
    log.info("%s: fetching %.0f MB", name, total / 1e6)
    before, started, ended = _size(folder), time.monotonic(), threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            done = _size(folder) - before
            rate = done / (time.monotonic() - started)
            left = f"{max(0, total - done) / rate:.0f} s left" if rate > 0 else "waiting"
            log.info("%s: %.0f of %.0f MB, %.1f MB/s, %s", name, done / 1e6, total / 1e6, rate / 1e6, left)

    thread = threading.Thread(target=watch, name="transfer-log", daemon=True)
    thread.start()
    try:
        yield
        log.info("%s: fetched in %.0f s", name, time.monotonic() - started)
    finally:
        ended.set()
        thread.join()


def _size(folder: Path) -> int:
    """Bytes that the files in `folder` take on disk. Unfinished files may be sparse."""
    total = 0
    for file in folder.glob("*"):
        try:
            status = file.stat()
        except FileNotFoundError:  # renamed after it was listed
            continue
        total += min(status.st_size, status.st_blocks * 512)
    return total
