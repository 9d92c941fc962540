"""Results by job, least recently used out first, bounded in bytes. Knows nothing of who asks.

A cache belongs to one loaded checkpoint and one compute dtype, and a job holds everything else that changes the result,
so an entry can never be stale.
"""

from collections import OrderedDict

from encoder.types import Job, PromptEmbeds


class Cache:
    """Byte-bounded LRU of prompt embeds; `max_bytes` 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._results: OrderedDict[Job, PromptEmbeds] = OrderedDict()

    def get(self, job: Job) -> PromptEmbeds | None:
        """The result of an equal job, or None."""
        if job in self._results:
            self._results.move_to_end(job)
        return self._results.get(job)

    def put(self, job: Job, result: PromptEmbeds) -> None:
        """Keep a result; a result larger than the whole cache is not kept."""
        size = result.hidden_states.nbytes
        if size > self.max_bytes or job in self._results:
            return
        self._results[job] = result
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, dropped = self._results.popitem(last=False)
            self.bytes -= dropped.hidden_states.nbytes
