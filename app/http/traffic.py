"""What all connections of a service share: limits, counts, the bytes that they hold, and the clock of their limits."""

import asyncio
import logging
import math
from collections import Counter
from dataclasses import dataclass
from threading import Thread
from typing import Protocol

from app.http.budget import Budget
from app.process import return_memory
from app.settings import Settings

logger = logging.getLogger(__name__)

# As far as they are counted; see `Connection.state` and `Traffic.timeouts`.
CONNECTION_STATES = (
    *("new", "head", "body", "working", "overdue", "writing"),
    *("dropping", "idle", "lingering", "closing"),
)
TIMEOUTS = ("header", "idle", "body", "answer", "write", "close")
ANSWER_SLACK_S = 5.0  # beyond a request's time, for it to say itself that its time is over
TICK_S = 0.5
STALLED_TICKS = 4  # without progress for so long, a body or a reply is given up when its bytes are needed
# So many bytes were held, and a quarter of them at most for so long: then the process gives free memory back.
PEAK_BYTES = 64 * 1024 * 1024
QUIET_TICKS = round(5 / TICK_S)
FREE_BYTES = 16 * 1024  # of each request, head included, are not counted: a small one is never refused for large ones


class Arriving(Protocol):
    """A request in arrival, as `Traffic` sees it."""

    progress_tick: int

    def refuse_bytes(self) -> None:
        """Stop its arrival, and give its bytes back."""


class Connected(Protocol):
    """A connection, as `Traffic` sees it."""

    state: str

    def sweep(self) -> None:
        """End what has taken too long."""

    def abort(self) -> None:
        """Close at once."""

    def stalled_ticks(self) -> int:
        """How long its reply has made no progress; 0 if none is being sent."""

    def give_up_reply(self, why: str) -> None:
        """Abort, and give back the bytes of the reply."""


@dataclass(frozen=True, slots=True)
class Ticks:
    """The limits of time, in ticks."""

    header: int
    body: int
    answer: int
    write: int
    idle: int


class Traffic:
    """Connections and their bytes, at this moment. Belongs to the event loop.

    Time is counted in ticks of our own, so that a process or machine that was suspended finds nobody late.

    Attributes:
        tick: number of sweeps so far.
        connections: those that are open and were not refused.
        refused_connections: those that are told so and are not closed yet.
        arriving: bytes of heads and bodies of requests that are not answered yet, beyond FREE_BYTES each.
        replies: bytes of results and replies, from planning until they have left the process.
        arrivals: the requests in arrival that hold bytes of `arriving`, the youngest last.
        timeouts: connections and requests that were too slow, by kind: header, idle, body, answer, write,
            close.
        refusals: answers of the protocol itself, which no route has seen, by the code of their error.
        draining: whether each reply is the last on its connection.
    """

    def __init__(self, settings: Settings) -> None:
        self.tick = 0
        self.connections: set[Connected] = set()
        self.refused_connections: set[Connected] = set()
        self.arriving = Budget(settings.max_arriving_bytes, self._refuse_arrivals)
        self.replies = Budget(settings.max_reply_bytes, self._give_up_replies)
        self.arrivals: dict[Arriving, None] = {}
        self.timeouts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.draining = False
        self._peak = self._quiet_ticks = 0  # bytes held since memory was given back, and for how long it was far fewer
        self.max_connections = settings.max_connections
        self.body_timeout_s = min(settings.body_timeout_s, settings.request_timeout_s)
        self.answer_timeout_s = settings.request_timeout_s + ANSWER_SLACK_S
        self.write_timeout_s = settings.write_timeout_s
        self.limits = Ticks(
            header=_ticks(settings.header_timeout_s),
            body=_ticks(self.body_timeout_s),
            answer=_ticks(self.answer_timeout_s),
            write=_ticks(settings.write_timeout_s),
            idle=_ticks(settings.idle_timeout_s),
        )

    def states(self) -> dict[str, int]:
        """Open connections by what they are at. Any thread may ask."""
        return Counter(connection.state for connection in list(self.connections))  # copied without giving up the GIL

    async def run(self) -> None:
        """Sweep for ever, whatever a sweep raises."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.sweep()
                self._return_memory()
            except Exception:  # a bug; without sweeps nothing would have a limit
                logger.exception("connections could not be swept")

    def sweep(self) -> None:
        """One tick: every connection ends what has taken too long."""
        self.tick += 1
        for budget in (self.arriving, self.replies):
            budget.measure(TICK_S)
        for connection in [*self.connections, *self.refused_connections]:
            try:
                connection.sweep()
            except Exception:  # a bug; it ends this connection and no other
                logger.exception("a connection could not be swept, it is closed")
                connection.abort()

    def _return_memory(self) -> None:
        """Some time after many bytes were held, let the kernel have them: malloc keeps them for the next requests."""
        held = self.arriving.taken + self.replies.taken
        self._peak = max(self._peak, held)
        self._quiet_ticks = self._quiet_ticks + 1 if self._peak > PEAK_BYTES and held < self._peak / 4 else 0
        if self._quiet_ticks >= QUIET_TICKS:
            self._peak = self._quiet_ticks = 0
            Thread(target=return_memory, daemon=True, name="memory").start()  # nobody waits for it

    def _refuse_arrivals(self, missing: int) -> None:
        """Free bytes in arrival: of requests that make no progress, the slowest first, then of the youngest."""
        allowed = self.arriving.taken - missing
        stalled_since = self.tick - STALLED_TICKS
        stalled = sorted((a for a in self.arrivals if a.progress_tick <= stalled_since), key=lambda a: a.progress_tick)
        for arrival in [*stalled, *reversed(self.arrivals)]:
            if self.arriving.taken <= allowed:
                return
            if arrival in self.arrivals:
                arrival.refuse_bytes()

    def _give_up_replies(self, missing: int) -> None:
        """Free bytes of replies that their clients do not read, the longest unread first."""
        allowed = self.replies.taken - missing
        stalled = [connection for connection in self.connections if connection.stalled_ticks() >= STALLED_TICKS]
        for connection in sorted(stalled, key=lambda connection: -connection.stalled_ticks()):
            if self.replies.taken <= allowed:
                return
            connection.give_up_reply("it makes no progress, and others need its memory")


def _ticks(seconds: float) -> int:
    return math.ceil(seconds / TICK_S)
