"""The watchdog ends a process whose event loop or worker hangs, and no other."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import pytest

from tests.app.running import PATIENCE_S

Watched = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def watched() -> Iterator[Watched]:
    """Runs a coroutine's body on a loop that may hang for half a second."""
    processes: list[subprocess.Popen[str]] = []

    def run(body: str) -> "subprocess.Popen[str]":
        program = f"""
import asyncio, time
from app import watchdog

async def main():
{textwrap.indent(textwrap.dedent(body), "    ")}

watchdog.TICK_S = 0.1
loop = asyncio.new_event_loop()
watchdog.Watchdog(loop, 0.5, 3).start()
print("begun", flush=True)
loop.run_until_complete(main())
"""
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_a_loop_that_hangs_ends_the_process_and_says_where(watched: Watched) -> None:
    process = watched("time.sleep(1000)  # here it hangs")
    _, log = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 3
    assert "the event loop has hung for more than 0.5 s" in log
    assert "thread MainThread:" in log and "run_until_complete" in log


def test_a_worker_that_hangs_ends_the_process_and_idle_ones_do_not(watched: Watched) -> None:
    """All later work of its kind would wait behind it."""
    process = watched(
        """
        from app.threads import BUILDER, PARSER, on
        await on(PARSER, time.sleep, 0.01)
        await asyncio.sleep(1)
        print("idle", flush=True)
        await on(BUILDER, time.sleep, 1000)  # here it hangs
        """
    )
    out, log = process.communicate(timeout=PATIENCE_S)

    assert (process.returncode, out) == (3, "begun\nidle\n")
    assert "the thread 'builder' has hung for more than 0.5 s" in log


def test_a_log_that_nobody_reads_does_not_keep_the_process(
    watched: Watched,
) -> None:
    """The loop may hang for that very reason."""
    process = watched(
        """
        import os
        while True:
            os.write(2, bytes(65536))
        """
    )

    assert process.wait(PATIENCE_S) == 3


def test_a_process_that_is_suspended_is_not_taken_to_hang(
    watched: Watched,
) -> None:
    """Neither its loop nor the watchdog runs then."""
    process = watched("for _ in range(20): await asyncio.sleep(0.1)")
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)

    assert process.wait(PATIENCE_S) == 0
