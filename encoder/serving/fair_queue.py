"""The order in which the parts of many requests get their turn: a small request waits for no large one.

Start-time fair queueing. There is a virtual time, which a request that is served all the time moves with. Each part of
a request has a start in it: the first starts now, and each of the others as much later as those before it cost. The
next turn is that of the part with the earliest start, so the parts of a large request alternate with all that comes.
Source: P. Goyal, H. Vin, H. Cheng, Start-time Fair Queuing, SIGCOMM 1996.

Unlike there, a request sends nothing after its first parts, and new ones come all the time. So the virtual time moves
by the cost of what is served, divided among the requests that wait, and not from start to start: those who come later
start later, and every part gets its turn.

Knows nothing of what the parts are. It has no lock of its own.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)
FIRST = -1.0  # the start of a part that goes before all others


class Place(NamedTuple, Generic[T]):
    """Where a part stands. Places are compared by their first two fields, of which no two are equal.

    Attributes:
        start: in virtual time.
        number: of those with equal starts, the lower goes first.
        part: that waits.
        request: the number of its request.
        cost: as given.
    """

    start: float
    number: int
    part: T
    request: int
    cost: float


class FairQueue(Generic[T]):
    """Parts that wait. Iterating gives them in their order."""

    def __init__(self) -> None:
        self._now = 0.0  # virtual time
        self._numbers = 0  # given since the start
        self._first_numbers = 0
        self._requests = 0  # since the start
        self._places: dict[T, Place[T]] = {}
        self._order: list[Place[T]] = []
        self._waiting: Counter[int] = Counter()  # parts of each request

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, part: T) -> bool:
        return part in self._places

    def __iter__(self) -> Iterator[T]:
        return (place.part for place in list(self._order))

    @property
    def num_requests(self) -> int:
        """Requests of which a part waits."""
        return len(self._waiting)

    def put(self, costs: Mapping[T, float]) -> None:
        """Let the parts of a request wait.

        Args:
            costs: of each part, in its order, in any unit; more than 0.
        """
        self._requests += 1
        start = self._now
        for part, cost in costs.items():
            self._numbers += 1
            self._insert(part, Place(start, self._numbers, part, self._requests, cost))
            start += cost

    def put_first(self, part: T) -> None:
        """Let a part wait before all others. It costs nobody anything."""
        self._requests += 1
        self._first_numbers -= 1
        self._insert(part, Place(FIRST, self._first_numbers, part, self._requests, 0.0))

    def hurry(self, parts: Iterable[T]) -> None:
        """Give parts that wait the turns that they would have if a request put them now, where that is sooner."""
        start = self._now
        for part in parts:
            place = self._places.get(part)
            if place is not None:
                if start < place.start:
                    self._remove(place)
                    self._insert(part, place._replace(start=start))
                start += place.cost

    def first(self, count: int) -> list[T]:
        """The next parts, at most so many."""
        return [place.part for place in islice(self._order, count)]

    def take(self, parts: Sequence[T]) -> None:
        """Remove parts that are served now, whatever their place. Errors: KeyError for a part that does not wait."""
        places = [self._places[part] for part in parts]
        share = len(self._waiting) + 1  # with one more request, which may come, so that it goes before those it finds
        for place in places:
            self._remove(place)
        earliest = min((place.start for place in places), default=self._now)
        self._now = max(self._now, earliest) + sum(place.cost for place in places) / share

    def discard(self, part: T) -> bool:
        """Remove a part that is not wanted any more; False where it does not wait."""
        place = self._places.get(part)
        if place is None:
            return False
        self._remove(place)
        return True

    def _insert(self, part: T, place: Place[T]) -> None:
        self._places[part] = place
        insort(self._order, place)
        self._waiting[place.request] += 1

    def _remove(self, place: Place[T]) -> None:
        del self._places[place.part]
        del self._order[bisect_left(self._order, place)]
        self._waiting[place.request] -= 1
        if not self._waiting[place.request]:
            del self._waiting[place.request]
