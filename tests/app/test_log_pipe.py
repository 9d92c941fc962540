"""Logging stops nothing, whatever happens to stderr."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.client import Client
from app.log_pipe import MAX_BYTES, PipeHandler
from tests.app.running import PATIENCE_S, wait_for

LINE = "x" * 1000
ENOUGH = MAX_BYTES // len(LINE)  # lines, to fill what may wait


class Pipe:
    """A pipe with a logger at one end."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.handler = PipeHandler(self.writer)
        self.logger = logging.Logger("test")
        self.logger.addHandler(self.handler)

    def read_lines(self, last: str) -> list[str]:
        """What comes until this line."""
        text = ""
        while not text.endswith(f"{last}\n"):
            text += os.read(self.reader, 2**16).decode()
        return text.splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.reader)
    pipe.handler.flush()  # so that its thread has nothing left to write
    os.close(pipe.writer)


def test_lines_come_in_order(pipe: Pipe) -> None:
    for number in range(1000):
        pipe.logger.info("line %d", number)

    assert pipe.read_lines("line 999") == [f"line {number}" for number in range(1000)]


def test_lines_are_written_after_one_that_could_not_be(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failed = pipe.handler._write, threading.Event()

    def fail(data: bytes) -> int:
        monkeypatch.setattr(pipe.handler, "_write", write)
        failed.set()
        raise MemoryError

    monkeypatch.setattr(pipe.handler, "_write", fail)
    pipe.logger.info("lost")
    assert failed.wait(PATIENCE_S)
    pipe.handler.flush()
    pipe.logger.info("written")

    assert pipe.read_lines("written") == ["written"]


def test_what_nobody_reads_is_dropped_and_counted(pipe: Pipe) -> None:
    for _ in range(3 * ENOUGH):
        pipe.logger.info(LINE)
    text = ""
    while "dropped" not in text:
        text += os.read(pipe.reader, 2**16).decode()

    *written, told = text.splitlines()
    assert set(written) == {LINE}
    assert len(written) + int(told.split()[0]) == 3 * ENOUGH
    assert len(text) < 2 * MAX_BYTES


def test_a_flush_waits_for_the_writer_and_not_for_ever(pipe: Pipe) -> None:
    pipe.logger.info("first")
    pipe.handler.flush()
    assert os.read(pipe.reader, 100) == b"first\n"

    for _ in range(ENOUGH):
        pipe.logger.info(LINE)
    flushing = threading.Thread(target=pipe.handler.flush)
    flushing.start()
    flushing.join(PATIENCE_S)

    assert not flushing.is_alive()


def test_a_record_that_cannot_be_shown_is_named(pipe: Pipe) -> None:
    pipe.logger.info("%d", "no number")
    pipe.logger.info("\ud800")

    first, _ = pipe.read_lines("\\ud800")
    assert "cannot be logged" in first


def test_a_full_disk_and_a_reader_that_is_gone_lose_lines_alone(pipe: Pipe) -> None:
    os.close(pipe.reader)
    pipe.logger.info("to nobody")
    pipe.handler.flush()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, pipe.writer)
    pipe.logger.info("onto a full disk")
    pipe.handler.flush()
    pipe.reader, writer = os.pipe()
    os.dup2(writer, pipe.writer)
    os.close(writer)
    os.close(full)
    pipe.logger.info("and on")

    assert "2 log lines were dropped" in pipe.read_lines("in time")[1]


def test_the_service_serves_though_nobody_reads_its_stderr(tmp_path: Path) -> None:
    """One process has it closed, the other's pipe is full from the beginning, so that any line would wait."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    sockets = {"exec 2>&-": tmp_path / "closed.sock", ":": tmp_path / "unread.sock"}
    command = [sys.executable, "-m", "app", "serve", "--uds"]
    processes = [
        subprocess.Popen(["sh", "-c", f'{before}; exec "$@"', "sh", *command, str(uds)], stderr=writer)
        for before, uds in sockets.items()
    ]
    for uds, process in zip(sockets.values(), processes, strict=True):
        wait_for(lambda uds=uds: is_listening(uds))
        with Client(uds=uds) as client:
            assert [client.encode("a cat").num_tokens for _ in range(20)] == [(5,)] * 20
        process.send_signal(signal.SIGTERM)

    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    os.close(reader)
    os.close(writer)


def is_listening(uds: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(uds)) == 0
