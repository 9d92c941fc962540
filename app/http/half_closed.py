"""Tells a client that has closed its sending half, and waits for its answer, from one that is gone.

Both look the same until something is sent to them: who is gone answers with a reset. So the first bytes of the response
are sent ahead, which are the same in all responses.
"""

import asyncio
import socket
from collections.abc import Callable

PROBE_S = 0.1  # between looks


def abort_when_gone(transport: asyncio.Transport, is_over: Callable[[], bool]) -> None:
    """Abort the transport once its client is known to be gone. Something must have been sent to it.

    Args:
        is_over: whether nobody needs to know any more.
    """
    if is_over():
        return
    if transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        transport.abort()
    else:
        asyncio.get_running_loop().call_later(PROBE_S, abort_when_gone, transport, is_over)
