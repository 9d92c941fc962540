"""Bytes that may be held at once, for one purpose. Belongs to the event loop."""

import math
import sys
from collections.abc import Callable

from starlette.types import Scope

from app.errors import TooManyBytes
from encoder import RequestTooLarge

RETRY_AFTER_S = 2  # where nothing has been given back lately; by then what makes no progress has been given up
MAX_RETRY_AFTER_S = 60
MEMORY = 0.8  # of the rate of the past that stays after a second
# Requests for more than SMALL_BYTES leave this share of the limit to smaller ones, so that a crowd of large ones, of
# which each waits for the model or a slow client, shuts nobody else out.
SMALL_BYTES = 2**20
SMALL_SHARE = 1 / 8


class Budget:
    """A number of bytes, taken before they are held and given back when they are not held any more.

    Args:
        limit: bytes that may be taken at once.
        make_room: asked for bytes that are missing, before they are refused; gives back some that others hold.
    Attributes:
        taken: bytes taken now.
        refused: requests that were refused for want of bytes.
    """

    def __init__(self, limit: int, make_room: Callable[[int], None]) -> None:
        self.limit = limit
        self.taken = 0
        self.refused = 0
        self._make_room = make_room
        self._given_back = 0  # since the last `measure`
        self._rate = 0.0  # bytes per second

    def take(self, num_bytes: int, spare: int = 0) -> bool:
        """Take bytes, or none of them and say False.

        Args:
            spare: bytes that others shall find free afterwards.
        """
        missing = self.taken + num_bytes + spare - self.limit
        if missing > 0:
            self._make_room(missing)
        if self.taken + num_bytes + spare > self.limit:
            return False
        self.taken += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """What was taken is free again."""
        self.taken -= num_bytes
        self._given_back += num_bytes

    def measure(self, seconds: float) -> None:
        """Note how fast bytes come back. Called once in so many seconds."""
        kept = MEMORY**seconds
        self._rate = kept * self._rate + (1 - kept) * self._given_back / seconds
        self._given_back = 0

    def retry_after_s(self, num_bytes: int) -> int:
        """Seconds until so many bytes are probably free."""
        missing = self.taken + num_bytes - self.limit
        if missing >= self._rate * MAX_RETRY_AFTER_S:
            return RETRY_AFTER_S
        return max(1, math.ceil(missing / self._rate)) if missing > 0 else 1


class Hold:
    """The bytes that one request holds for its results and its reply.

    Args:
        budget: where they are taken from.
    """

    __slots__ = ("_budget", "num_bytes")

    def __init__(self, budget: Budget) -> None:
        self.num_bytes = 0
        self._budget = budget

    def take(self, num_bytes: int) -> None:
        """Hold more bytes. Errors: RequestTooLarge if waiting would not help, TooManyBytes."""
        budget, total = self._budget, self.num_bytes + num_bytes
        spare = round(budget.limit * SMALL_SHARE) if total > SMALL_BYTES else 0
        if total > budget.limit - spare:
            raise RequestTooLarge(
                f"The results and the reply would take {total:,} bytes of memory; large requests together may take "
                f"{budget.limit - spare:,}. Ask for fewer prompts, layers or rows, or a shorter dtype."
            )
        if not budget.take(num_bytes, spare):
            budget.refused += 1
            raise TooManyBytes(
                f"Results and replies take {budget.taken:,} of {budget.limit:,} bytes of memory; this request adds "
                f"{num_bytes:,}.",
                budget.retry_after_s(num_bytes),
            )
        self.num_bytes += num_bytes

    def cover(self, num_bytes: int) -> None:
        """Hold at least so many bytes. Errors: as `take`."""
        if num_bytes > self.num_bytes:
            self.take(num_bytes - self.num_bytes)

    def release(self) -> None:
        """Give all of them back."""
        if self.num_bytes:
            self._budget.give_back(self.num_bytes)
            self.num_bytes = 0


def hold_of(scope: Scope) -> Hold:
    """What the request holds, until its reply has left the process.

    Under another server than ours it is bounded by nothing, because that server does not tell when a reply has left.
    """
    return scope.get("state", {}).get("hold") or Hold(Budget(sys.maxsize, make_room=lambda _: None))
