"""The end of the service. Each step has a limit, and what is not done at the last one is abandoned.

accepted requests are answered (`drain_timeout_s`) → what is left gets 503 → nothing more is accepted from the socket →
replies are sent to their end, and connections closed (LAST_BYTES_S) → the engine closes (CLOSE_S) → the process exits
"""

import asyncio
import atexit
import logging
import os
import select
import socket
import threading
from collections.abc import Collection, Sequence
from typing import NoReturn

from app.http.connection import Connection
from app.listen import refuse_connections

logger = logging.getLogger(__name__)

LAST_BYTES_S = 5.0  # for replies that are still being sent when all work is done
CLOSE_S = 3.0  # for a forward pass to return, and for results to be written to the disk
QUIET_S = 0.5  # a connection on which nothing has come for so long is not about to bring a request
SLACK_S = 2.0  # that a step may be late on a busy machine
EXIT_S = 0.5
POLL_S = 0.02
LIMIT_S = LAST_BYTES_S + CLOSE_S + SLACK_S  # of all that follows the drain


async def empty_backlog(sockets: Sequence[socket.socket]) -> None:
    """Let in no new connection, and return when the event loop has accepted those that clients have made."""
    for sock in sockets:
        refuse_connections(sock)
    waiting = select.poll()
    for sock in sockets:
        waiting.register(sock, select.POLLIN)
    for _ in range(round(QUIET_S / POLL_S)):
        if not waiting.poll(0):
            return
        await asyncio.sleep(POLL_S)


async def close_connections(connections: Collection[Connection]) -> None:
    """Return when all connections are closed.

    A request whose head is incomplete gets 503. What is left after LAST_BYTES_S is cut off.
    """
    for _ in range(round(LAST_BYTES_S / POLL_S)):
        if not connections:
            return
        for connection in tuple(connections):
            connection.close_if_silent(QUIET_S)
        await asyncio.sleep(POLL_S)
    logger.warning("%d connections are cut off: their clients have not read the replies", len(connections))
    for connection in tuple(connections):
        connection.abort()


def exit_within(seconds: float) -> None:
    """End the process after so long, if it has not ended by then: whatever hangs, a supervisor need not wait longer."""
    timer = threading.Timer(seconds, _give_up)
    timer.daemon = True
    timer.start()


def _give_up() -> None:
    logger.error("the service has not ended in time and exits now")
    leave(1)


def leave(exit_code: int) -> NoReturn:
    """Exit without waiting for threads: one may be in a forward pass, or wait for a disk that hangs.

    What is registered for the exit gets EXIT_S, the removal of temporary folders for one; then the log is written.
    """
    last = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    last.start()
    last.join(EXIT_S)
    logging.shutdown()
    os._exit(exit_code)
