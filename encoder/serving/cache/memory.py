"""The first tier: results in memory, an LRU cache bounded in bytes.

It belongs to one loaded checkpoint and one compute dtype, and a job holds everything else that changes the result,
so no entry can be stale.
"""

from collections import OrderedDict

from encoder.types import Job, PromptEmbeds

# Bytes of an entry beside its numbers: tracemalloc measures 800, and 40 for each token of the key.
ENTRY_BYTES = 800
TOKEN_BYTES = 40


class MemoryCache:
    """Byte-bounded LRU of prompt embeds; `max_bytes` 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.evictions = 0
        self._results: OrderedDict[Job, PromptEmbeds] = OrderedDict()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, job: Job) -> PromptEmbeds | None:
        """The result of an equal job, or None."""
        result = self._results.get(job)
        if result is not None:
            self._results.move_to_end(job)
        return result

    def clear(self) -> None:
        """Forget all results. They do not count as evicted."""
        self._results.clear()
        self.bytes = 0

    def put(self, job: Job, result: PromptEmbeds) -> None:
        """Keep a result, in place of an older one. A result larger than the whole cache is not kept."""
        size = entry_bytes(job, result)
        if size > self.max_bytes:
            return
        if job in self._results:
            self.bytes -= entry_bytes(job, self._results.pop(job))
        self._results[job] = result
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= entry_bytes(*self._results.popitem(last=False))
            self.evictions += 1


def entry_bytes(job: Job, result: PromptEmbeds) -> int:
    """Bytes of an entry, key included."""
    numbers = result.hidden_states.nbytes + result.attention_mask.nbytes
    return numbers + ENTRY_BYTES + TOKEN_BYTES * len(job.input_ids)
