"""A bounded queue, measured in tokens, from which batches are taken.

Knows nothing of tensors, threads or HTTP. It has no lock of its own, see batch_loop.py.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from encoder.errors import QueueFull, RequestTooLarge
from encoder.serving.entry import Entry

WINDOW = 64  # waiting entries that one batch is chosen from, so that the choice stays cheap however long the queue is


class Batcher:
    """The waiting entries, oldest first.

    Args:
        max_queue_tokens: padded tokens that may wait.
        max_batch_tokens: padded tokens in one batch; a longer entry still runs, alone.
        count_tokens: padded tokens of a batch of entries of these lengths; by default those of a rectangle.
        overhead_rows: the fixed cost of a batch, in tokens.
    """

    def __init__(
        self,
        max_queue_tokens: int,
        max_batch_tokens: int,
        count_tokens: Callable[[Sequence[int]], int] = lambda lengths: len(lengths) * max(lengths),
        overhead_rows: int = 32,
    ) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.max_batch_tokens = max_batch_tokens
        self.count_tokens = count_tokens
        self.overhead_rows = overhead_rows
        self.queued_tokens = 0
        self._requests = 0  # queued since the start: numbers them
        self._waiting: dict[Entry, None] = {}  # in order of arrival, with removal from anywhere

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._waiting))

    def check(self, entries: Sequence[Entry]) -> None:
        """Errors: RequestTooLarge when the entries of a request would not fit an empty queue."""
        tokens = sum(entry.length for entry in entries)
        if tokens > self.max_queue_tokens:
            raise RequestTooLarge(
                f"The request adds {tokens} padded tokens, the whole queue holds {self.max_queue_tokens}. "
                "Send fewer prompts at a time."
            )

    def put(self, entries: Sequence[Entry], retry_after_s: int) -> None:
        """Queue all entries of a request, or none of them.

        Args:
            entries: of one request.
            retry_after_s: seconds after which a refused request should try again.
        Errors: RequestTooLarge as in `check`, QueueFull when they don't fit now.
        """
        self.check(entries)
        tokens = sum(entry.length for entry in entries)
        if self.queued_tokens + tokens > self.max_queue_tokens:
            raise QueueFull(
                f"The queue holds {self.queued_tokens} of {self.max_queue_tokens} tokens, this request adds {tokens}. "
                f"Retry in {retry_after_s} s.",
                retry_after_s,
            )
        self._requests += 1
        for entry in entries:
            entry.request = self._requests
        self._waiting.update(dict.fromkeys(entries))
        self.queued_tokens += tokens

    def put_first(self, entry: Entry) -> None:
        """Queue an entry before all others, even where there is no room."""
        self._waiting = {entry: None, **self._waiting}
        self.queued_tokens += entry.length

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False when it had left already."""
        if entry not in self._waiting:
            return False
        del self._waiting[entry]
        self.queued_tokens -= entry.length
        return True

    def take_oldest(self) -> list[Entry]:
        """Remove and return the oldest entry, where there is one."""
        oldest = list(islice(self._waiting, 1))
        for entry in oldest:
            self.discard(entry)
        return oldest

    def take_batch(self, running: int = 0) -> list[Entry]:
        """Remove and return the next batch; empty when nothing waits.

        The oldest entry leads every batch, so no entry starves. Of those behind it, the nearest in length join first,
        as long as the batch stays inside its token budget. Each joins only where it costs less than in a batch of its
        own: a long or a deep entry makes all others longer or deeper.

        Once a batch has paid for its fixed cost, it takes from other requests no more than half of the entries that
        wait and run. So one half runs while the other is answered and its clients ask again. Otherwise nearly all
        clients would be answered at the same time, and the model would wait for their next requests.

        Args:
            running: entries of batches that have been taken and not delivered.
        """
        window = list(islice(self._waiting, WINDOW))
        if not window:
            return []
        lead = window[0]
        batch, lengths = [lead], [lead.length]
        tokens, depth = self.count_tokens(lengths), lead.job.depth
        half = math.ceil((len(self._waiting) + running) / 2)
        for entry in sorted(window[1:], key=lambda entry: abs(entry.length - lead.length)):
            if len(batch) >= half and tokens >= self.overhead_rows and entry.request != lead.request:
                continue
            joined_tokens, joined_depth = self.count_tokens([*lengths, entry.length]), max(depth, entry.job.depth)
            apart = self._cost(tokens, depth) + self._cost(self.count_tokens([entry.length]), entry.job.depth)
            if joined_tokens <= self.max_batch_tokens and self._cost(joined_tokens, joined_depth) <= apart:
                batch.append(entry)
                lengths.append(entry.length)
                tokens, depth = joined_tokens, joined_depth
        for entry in batch:
            self.discard(entry)
        return batch

    def _cost(self, tokens: int, depth: int) -> int:
        """The cost of a batch, in tokens through one layer."""
        return (tokens + self.overhead_rows) * depth
