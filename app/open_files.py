"""How many files this process may have open, and so how many connections it can take.

Where the limit is reached, nothing can be accepted or opened, and the event loop closes new connections without a word.
So the service refuses connections before that, and says why.
"""

import contextlib
import logging
import math
import resource
import time

logger = logging.getLogger(__name__)

WANTED = 10_240  # macOS gives no process more; there the soft limit is 256
# For the checkpoint, the cache on disk and the event loop; three quarters of a limit for which that is too much.
RESERVED = 64
REMIND_S = 60.0

_reminded_at = -math.inf


def raise_limit() -> None:
    """Raise the soft limit of open files to WANTED, or as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # a system may allow less than its hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def max_connections() -> int | None:
    """How many connections may be open at once; None if the limit of open files is infinite."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else max(soft - RESERVED, soft // 4)


def warn(refused: str) -> None:
    """Log what was refused and the remedy; once in REMIND_S, since it can happen thousands of times in a second."""
    global _reminded_at
    if time.monotonic() - _reminded_at >= REMIND_S:
        _reminded_at = time.monotonic()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        logger.warning(
            "%s: this process may have %d files open, connections included. Raise that with `ulimit -n` in the shell "
            "that starts it, `--ulimit nofile=` of docker, or LimitNOFILE= of systemd.",
            refused,
            soft,
        )
