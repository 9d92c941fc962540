"""A bounded queue, measured in tokens, from which batches are taken. Step 2 of the path.

Batches by token count. Knows nothing of tensors, threads or HTTP; has no lock of its own, see batch_loop.py.
"""

import math
import time
from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from encoder.errors import EncoderError, QueueFull, RequestTooLarge
from encoder.types import Job, Pass, PromptEmbeds

WINDOW = 64  # waiting entries looked at for one batch, so that forming it stays cheap however long the queue is


@dataclass(eq=False, slots=True)
class Entry:
    """A job that waits or runs.

    `length` is in tokens, live padding included, and at least 1; `outcome` is None until it is settled; `waiters` are
    told then, one for each request that wants it, `request` is the number of the one that queued it; `store` says
    whether the result may be kept, `from_disk` whether it was found there and never ran; times are in seconds of
    time.perf_counter, 0 while not known; `last_pass` is the pass it ran in, where those are measured.
    """

    job: Job
    length: int
    outcome: PromptEmbeds | EncoderError | None = None
    waiters: "list[Future[None]]" = field(default_factory=list)
    request: int = 0
    store: bool = True
    from_disk: bool = False
    enqueued_at: float = field(default_factory=time.perf_counter)
    started_at: float = 0.0
    finished_at: float = 0.0
    last_pass: Pass | None = None


class Batcher:
    """The waiting entries, oldest first.

    Args:
        max_queue_tokens: padded tokens that may wait.
        max_batch_tokens: tokens in one batch; an entry that is longer alone still runs, alone.
        count_tokens: tokens that run for a batch of such lengths; a rectangle unless told otherwise.
        batch_rows: what a batch costs on top of its tokens, in tokens.
    """

    def __init__(
        self,
        max_queue_tokens: int,
        max_batch_tokens: int,
        count_tokens: Callable[[Sequence[int]], int] = lambda lengths: len(lengths) * max(lengths),
        batch_rows: int = 32,
    ) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.max_batch_tokens = max_batch_tokens
        self.count_tokens = count_tokens
        self.batch_rows = batch_rows
        self.queued_tokens = 0
        self._requests = 0
        self._waiting: dict[Entry, None] = {}  # in order of arrival, with removal from anywhere

    def __len__(self) -> int:
        return len(self._waiting)

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

        Errors: as `check`, and QueueFull when they don't fit now.
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

    def discard(self, entry: Entry) -> bool:
        """Take an entry out of the queue; False when it had left already."""
        if entry not in self._waiting:
            return False
        del self._waiting[entry]
        self.queued_tokens -= entry.length
        return True

    def take_batch(self, running: int = 0) -> list[Entry]:
        """Remove and return the next batch; empty when nothing waits.

        The oldest entry leads every batch, so nobody starves. Of those behind it, the nearest in length join first,
        while the batch stays inside its token budget, and each only where it costs less than in a batch of its own:
        a long or a deep entry makes all others longer or deeper.

        A batch that has paid for itself takes from other requests no more than half of what waits and runs: one half
        runs while the other is answered and its clients ask again. Else nearly all would be answered at one time, and
        the model would wait for that.

        Args:
            running: entries of the batch before this one, as far as it has not been finished.
        """
        window = list(islice(self._waiting, WINDOW))
        if not window:
            return []
        lead = window[0]
        batch, lengths = [lead], [lead.length]
        tokens, depth = self.count_tokens(lengths), lead.job.depth
        half = math.ceil((len(self._waiting) + running) / 2)
        for entry in sorted(window[1:], key=lambda entry: abs(entry.length - lead.length)):
            if len(batch) >= half and tokens >= self.batch_rows and entry.request != lead.request:
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
        """Of a batch, in tokens through one layer."""
        return (tokens + self.batch_rows) * depth
