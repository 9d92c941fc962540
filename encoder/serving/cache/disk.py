"""The second tier of the cache: results that outlive the process, read and written beside the event loop.

The event loop does all bookkeeping, and threads only touch files. No failure of the folder fails a request.
"""

import asyncio
import logging
from asyncio import Future
from collections.abc import Callable, Sequence
from functools import partial

from encoder.serving.cache.folder import ResultFolder
from encoder.serving.cache.key import result_key
from encoder.serving.cache.memory import entry_bytes
from encoder.serving.cache.threads import DaemonThreads
from encoder.types import Job, PromptEmbeds

log = logging.getLogger(__name__)

READERS = 4  # threads
LOOKUP_S = 5.0  # a slower disk is no help: the model runs instead
MAX_READS = 256  # that wait or run at once; further results are computed
CLOSE_S = 2.0  # for results that wait to be written when the cache is closed
MAX_PENDING_BYTES = 256 * 2**20  # of results that wait to be written; further ones are dropped


class DiskCache:
    """Results of one loaded model in a folder.

    Args:
        folder: where they are.
        identity: of the model, as in `model_identity`.
    """

    def __init__(self, folder: ResultFolder, identity: str) -> None:
        self._folder = folder
        self._identity = identity
        self._readers = DaemonThreads(READERS, "disk-cache-reader")
        self._writer = DaemonThreads(1, "disk-cache-writer")
        self._writes: set[Future[None]] = set()  # that wait or run
        self._reads = 0  # that wait or run
        self._pending: dict[Job, PromptEmbeds] = {}  # results that wait to be written
        self._overdue: set[Future[PromptEmbeds | None]] = set()  # reads that have taken too long and still run
        self._touching: Future[None] | None = None
        self._warned = False
        self._hits = self._errors = self._dropped = self._pending_bytes = 0

    def open(self) -> None:
        """Create the folder and count its files, in the background."""
        self._in_background(self._folder.open)

    def change_model(self, identity: str) -> None:
        """Keep the results of another model from now on; what waits to be written is still that of the one before."""
        self._identity = identity
        self._pending.clear()

    async def find(self, jobs: Sequence[Job]) -> dict[Job, PromptEmbeds]:
        """The results that are in the folder and can be read in time. A failure of the folder is a miss."""
        found = {job: self._pending[job] for job in jobs if job in self._pending}
        if not self._overdue:  # else the disk hangs
            found |= await self._read([job for job in jobs if job not in found])
        self._hits += len(found)
        return found

    def write(self, job: Job, result: PromptEmbeds) -> None:
        """Keep a result, in the background. It is dropped where too many bytes wait already."""
        size = entry_bytes(job, result)
        if self._writes and self._pending_bytes + size > MAX_PENDING_BYTES:
            self._dropped += 1
            return
        writing = self._in_background(partial(self._store, self._identity, job, result))
        self._writes.add(writing)
        self._pending[job] = result
        self._pending_bytes += size

        def written(done: Future[None]) -> None:
            self._writes.discard(done)
            self._pending_bytes -= size
            if self._pending.get(job) is result:
                del self._pending[job]
            if done.exception() is None:
                self._warned = False

        writing.add_done_callback(written)

    def touch(self, jobs: Sequence[Job]) -> None:
        """Mark as used what memory has answered, so that the folder does not evict it; not while a touch still runs."""
        if self._touching is None or self._touching.done():
            self._touching = self._in_background(partial(self._touch, self._identity, jobs))

    def stats(self) -> dict[str, int]:
        """Gauges and counters by the names of EngineStats."""
        return {
            "disk_cache_bytes": self._folder.bytes,
            "disk_cache_entries": self._folder.entries,
            "disk_cache_evictions": self._folder.evictions,
            "disk_cache_hits": self._hits,
            "disk_cache_errors": self._errors,
            "disk_cache_dropped": self._dropped,
        }

    async def close(self) -> None:
        """Write what is pending, for as long as CLOSE_S. What hangs then is left behind."""
        if self._writes:
            await asyncio.wait(self._writes, timeout=CLOSE_S)
        if self._writes:
            log.warning("cache in %s: %d results are lost, the disk is too slow", self._folder.path, len(self._writes))
        for threads in (self._writer, self._readers):
            threads.close()

    async def _read(self, jobs: Sequence[Job]) -> dict[Job, PromptEmbeds]:
        if not jobs or self._reads + len(jobs) > MAX_READS:
            return {}
        reads = {self._readers.run(partial(self._load, self._identity, job)): job for job in jobs}
        self._reads += len(reads)
        for read in reads:
            read.add_done_callback(self._read_ended)
        done, overdue = await asyncio.wait(reads, timeout=LOOKUP_S)
        if overdue:
            self._count_error(TimeoutError(f"no answer within {LOOKUP_S:g} s"))
        for read in overdue:
            self._overdue.add(read)
            read.add_done_callback(self._overdue.discard)
        found = {}
        for read in done:
            if (error := read.exception()) is not None:
                self._count_error(error)
            elif (result := read.result()) is not None:
                found[reads[read]] = result
        return found

    def _read_ended(self, _: Future[PromptEmbeds | None]) -> None:
        self._reads -= 1

    # On threads: a key takes a millisecond where a prompt is long.

    def _load(self, identity: str, job: Job) -> PromptEmbeds | None:
        return self._folder.read(result_key(identity, job))

    def _store(self, identity: str, job: Job, result: PromptEmbeds) -> None:
        self._folder.write(result_key(identity, job), result)

    def _touch(self, identity: str, jobs: Sequence[Job]) -> None:
        self._folder.touch([result_key(identity, job) for job in jobs])

    def _in_background(self, work: Callable[[], None]) -> Future[None]:
        future = self._writer.run(work)
        future.add_done_callback(lambda done: self._count_error(error) if (error := done.exception()) else None)
        return future

    def _count_error(self, error: BaseException) -> None:
        """Count an error. Log it, unless errors have been logged since a write last succeeded."""
        self._errors += 1
        if not self._warned:
            self._warned = True
            log.warning("cache in %s: %s. Requests are served without it where it fails.", self._folder.path, error)
