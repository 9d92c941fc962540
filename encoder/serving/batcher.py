"""A bounded queue, measured in tokens, from which batches are taken: fair by tokens between requests.

Knows nothing of tensors, threads or HTTP. It has no lock of its own, see batch_loop.py.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from encoder.errors import QueueFull, RequestTooLarge
from encoder.serving.entry import Entry
from encoder.serving.fair_queue import FairQueue

WINDOW = 64  # waiting entries that one batch is chosen from, so that the choice stays cheap however long the queue is
# How many prompts a request has in a batch, of each prompt of the smallest request of late: a single prompt that comes
# beside 64 waits for one such batch and runs in the next, 8 of 64.
SHARE = 4
MIN_SHARE_OVERHEADS = 2  # fixed costs of a batch that a request may fill whatever its share, or batches cost too much
ROOM_SHARE = 8  # a refused request is told to wait until this share of the queue is free, so that others find room too


class Batcher:
    """The waiting entries, in the order of their turns.

    Args:
        max_queue_tokens: padded tokens that may wait.
        max_batch_tokens: padded tokens in one batch; a longer entry still runs, alone.
        count_tokens: padded tokens of a batch of entries of these lengths; by default those of a rectangle.
        overhead_rows: the fixed cost of a batch, in tokens.
    Attributes:
        queued_tokens: of entries that wait.
        running, running_tokens: entries that were taken and have not finished, and their tokens.
        smallest: prompts of the smallest request of late.
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
        self.queued_tokens = self.running = self.running_tokens = self.smallest = 0
        self._waiting: FairQueue[Entry] = FairQueue()
        self._requests = 0  # queued since the start: numbers them
        self._since_smallest = 0  # tokens taken since the smallest request of late came

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._waiting)

    @property
    def num_requests(self) -> int:
        """Requests of which an entry waits."""
        return self._waiting.num_requests

    def check(self, entries: Sequence[Entry]) -> None:
        """Errors: RequestTooLarge when the entries of a request would not fit an empty queue."""
        tokens = _tokens(entries)
        if tokens > self.max_queue_tokens:
            raise RequestTooLarge(
                f"The request adds {tokens} padded tokens, the whole queue holds {self.max_queue_tokens}. "
                "Send fewer prompts at a time."
            )

    def tokens_before_room(self, entries: Sequence[Entry]) -> int:
        """Tokens that must run before the queue has room for these entries, and for others beside them."""
        wanted = max(_tokens(entries), self.max_queue_tokens // ROOM_SHARE)
        return self.running_tokens + max(0, self.queued_tokens + wanted - self.max_queue_tokens)

    def put(self, entries: Sequence[Entry], retry_after_s: int) -> None:
        """Queue all entries of a request, or none of them.

        Args:
            entries: of one request.
            retry_after_s: seconds after which a refused request should try again.
        Errors: RequestTooLarge as in `check`, QueueFull when they don't fit now.
        """
        self.check(entries)
        tokens = _tokens(entries)
        if self.queued_tokens + tokens > self.max_queue_tokens:
            raise QueueFull(
                f"The queue holds {self.queued_tokens} of {self.max_queue_tokens} tokens, this request adds {tokens}. "
                f"Retry in {retry_after_s} s.",
                retry_after_s,
            )
        self._requests += 1
        for entry in entries:
            entry.request, entry.stage = self._requests, "queue"
        self._waiting.put({entry: entry.length for entry in entries})
        self.queued_tokens += tokens
        self._note_size(len(entries))

    def put_first(self, entry: Entry) -> None:
        """Queue an entry before all others, even where there is no room."""
        self._waiting.put_first(entry)
        self.queued_tokens += entry.length

    def hurry(self, entries: Sequence[Entry]) -> None:
        """Let entries of others wait no longer than if this request, which wants them too, had queued them now."""
        self._waiting.hurry(entries)
        self._note_size(len(entries))

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False when it had left already."""
        if not self._waiting.discard(entry):
            return False
        self.queued_tokens -= entry.length
        return True

    def take_first(self) -> list[Entry]:
        """Remove and return the entry whose turn it is, where there is one."""
        return self._take(self._waiting.first(1))

    def take_batch(self) -> list[Entry]:
        """Remove and return the next batch; empty when nothing waits.

        The entry whose turn it is leads every batch, so no entry starves. Of those behind it, the nearest in length
        join first, as long as the batch stays inside its token budget. Each joins only where it costs less than in a
        batch of its own: a long or a deep entry makes all others longer or deeper.

        Once a batch has paid for its fixed cost, it takes from other requests no more than half of the entries that
        wait and run. So one half runs while the other is answered and its clients ask again. Otherwise nearly all
        clients would be answered at the same time, and the model would wait for their next requests.

        No request has many times as many entries in a batch as the smallest request of late, see SHARE. Otherwise
        a small request would wait as long as the large one that it shares a batch with, or comes behind.
        """
        window = self._waiting.first(WINDOW)
        if not window:
            return []
        lead = window[0]
        batch = _Batch(self, lead)
        half = math.ceil((len(self) + self.running) / 2)
        for entry in sorted(window[1:], key=lambda entry: abs(entry.length - lead.length)):
            is_half = len(batch.entries) >= half and batch.tokens >= self.overhead_rows
            if not (is_half and entry.request != lead.request) and not batch.has_share_of(entry.request):
                batch.join_if_cheaper(entry)
        return self._take(batch.entries)

    def finish(self, entries: Sequence[Entry]) -> None:
        """Note that entries that were taken run no more."""
        self.running -= len(entries)
        self.running_tokens -= _tokens(entries)

    def _note_size(self, prompts: int) -> None:
        """A request of so many prompts has come. Late is what came within the tokens of a full queue."""
        if not 0 < self.smallest < prompts or self._since_smallest > self.max_queue_tokens:
            self.smallest, self._since_smallest = prompts, 0

    def _take(self, entries: list[Entry]) -> list[Entry]:
        tokens = _tokens(entries)
        self._waiting.take(entries)
        for entry in entries:
            entry.stage = "model"
        self.queued_tokens -= tokens
        self._since_smallest += tokens
        self.running += len(entries)
        self.running_tokens += tokens
        return entries


class _Batch:
    """A batch in the making."""

    def __init__(self, batcher: Batcher, lead: Entry) -> None:
        self.entries = [lead]
        self.tokens = batcher.count_tokens([lead.length])
        self._batcher = batcher
        self._lengths = [lead.length]
        self._depth = lead.job.depth
        self._entries_of = Counter([lead.request])
        self._tokens_of = Counter({lead.request: lead.length})

    def has_share_of(self, request: int) -> bool:
        """Whether it has as many entries of this request as it may."""
        return (
            self._entries_of[request] >= SHARE * self._batcher.smallest
            and self._tokens_of[request] >= MIN_SHARE_OVERHEADS * self._batcher.overhead_rows
        )

    def join_if_cheaper(self, entry: Entry) -> None:
        """Let an entry join if there is room, and if it costs no more here than alone."""
        count = self._batcher.count_tokens
        tokens, depth = count([*self._lengths, entry.length]), max(self._depth, entry.job.depth)
        apart = self._cost(self.tokens, self._depth) + self._cost(count([entry.length]), entry.job.depth)
        if tokens <= self._batcher.max_batch_tokens and self._cost(tokens, depth) <= apart:
            self.entries.append(entry)
            self._lengths.append(entry.length)
            self._entries_of[entry.request] += 1
            self._tokens_of[entry.request] += entry.length
            self.tokens, self._depth = tokens, depth

    def _cost(self, tokens: int, depth: int) -> int:
        """The cost of a batch, in tokens through one layer."""
        return (tokens + self._batcher.overhead_rows) * depth


def _tokens(entries: Sequence[Entry]) -> int:
    return sum(entry.length for entry in entries)
