"""Log lines on their way to stderr: a thread writes them, so that whoever reads them slowly stops no request.

Lines that do not fit into MAX_BYTES are dropped, and counted in a line of their own once there is room again. A stderr
that is closed or full loses lines, never a request.
"""

import collections
import logging
import os
import select
import threading

MAX_BYTES = 2**20  # of lines that wait to be written
BATCH_BYTES = 2**16  # of lines that one call writes
GATHER_S = 0.01  # from a line to its writing, so that many lines wake the thread once
FLUSH_S = 1.0  # longest wait for the reader at the end


class PipeHandler(logging.Handler):
    """Writes records as lines to a file descriptor, in the order in which they come.

    Attributes:
        lost_lines: that were dropped, or could not be written, since the start.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._mutex = threading.Lock()  # of all that follows; nobody waits for a reader while holding it
        self._lines: collections.deque[bytes] = collections.deque()
        self._waiting = 0  # bytes of them
        self._dropped = 0
        self.lost_lines = 0
        self._thread: threading.Thread | None = None
        self._there_are_lines = threading.Event()
        self._all_written = threading.Event()
        self._hurry = threading.Event()
        self._all_written.set()

    def emit(self, record: logging.LogRecord) -> None:
        """Take one record, on any thread. Never waits for a reader."""
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001  # arguments that do not fit the message, or cannot be shown
            line = f"a record of {record.name}, line {record.lineno}, cannot be logged: {error!r}"
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._mutex:
            if self._waiting + len(data) > MAX_BYTES:
                self._dropped += 1
                self.lost_lines += 1
                return
            self._lines.append(data)
            self._waiting += len(data)
            if not self._there_are_lines.is_set():
                self._all_written.clear()
                self._there_are_lines.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_forever, name="log", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Return when all lines are written, or after FLUSH_S."""
        self._hurry.set()
        self._all_written.wait(FLUSH_S)
        self._hurry.clear()

    def _write_forever(self) -> None:
        while True:
            self._there_are_lines.wait()
            self._hurry.wait(GATHER_S)
            try:
                self._write_next()
            except Exception:  # noqa: BLE001  # as without memory; if this thread ended, nothing would be logged again
                self._drop_all()

    def _write_next(self) -> None:
        data, told = self._take()
        lost = self._write(data)
        with self._mutex:
            self._dropped += lost - bool(told) if lost else -told
            self.lost_lines += lost - bool(told) if lost else 0
            if not self._lines:
                self._all_written.set()

    def _drop_all(self) -> None:
        """Drop what waits, so that the next line finds everything as at the start."""
        with self._mutex:
            self._dropped += len(self._lines)
            self.lost_lines += len(self._lines)
            self._lines.clear()
            self._waiting = 0
            self._there_are_lines.clear()
            self._all_written.set()

    def _take(self) -> tuple[bytes, int]:
        """The next lines. The last of all tells how many were dropped, if any; that number comes with them."""
        with self._mutex:
            batch = [self._lines.popleft()]
            while self._lines and sum(map(len, batch)) < BATCH_BYTES:
                batch.append(self._lines.popleft())
            self._waiting -= sum(map(len, batch))
            if not self._lines:
                self._there_are_lines.clear()
            told = 0 if self._lines else self._dropped
            if told:
                batch.append(self.format(_about_dropped(told)).encode() + b"\n")
        return b"".join(batch), told

    def _write(self, data: bytes) -> int:
        """Write all of it. Returns how many lines are lost because that is not possible."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody has made it non-blocking
                ready = select.poll()
                ready.register(self._descriptor, select.POLLOUT)
                ready.poll()
            except OSError:  # closed, full, or its reader is gone
                return bytes(rest).count(b"\n")
        return 0


def _about_dropped(lines: int) -> logging.LogRecord:
    """What is logged in place of lines that were dropped."""
    message, level = "%d log lines were dropped: stderr was not read in time", logging.WARNING
    return logging.LogRecord(__name__, level, __file__, 0, message, (lines,), None)
