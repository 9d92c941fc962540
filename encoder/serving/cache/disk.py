"""The second tier of the cache: results that outlive the process, read and written beside the event loop.

The event loop does all bookkeeping, and threads only touch files. No failure of the folder fails a request.
"""

import asyncio
import logging
from asyncio import Future
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from encoder.serving.cache.folder import ResultFolder
from encoder.serving.cache.key import result_key
from encoder.types import Job, PromptEmbeds

log = logging.getLogger(__name__)

READERS = 4  # threads
LOOKUP_S = 5.0  # a slower disk is no help: the model runs instead
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
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="disk-cache-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="disk-cache-writer")
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
        size = result.hidden_states.nbytes
        if self._pending and self._pending_bytes + size > MAX_PENDING_BYTES:
            self._dropped += 1
            return
        writing = self._in_background(self._store, self._identity, job, result)
        self._pending[job] = result
        self._pending_bytes += size

        def written(done: Future[None]) -> None:
            self._pending_bytes -= size
            if self._pending.get(job) is result:
                del self._pending[job]
            if done.exception() is None:
                self._warned = False

        writing.add_done_callback(written)

    def touch(self, jobs: Sequence[Job]) -> None:
        """Mark as used what memory has answered, so that the folder does not evict it; not while a touch still runs."""
        if self._touching is None or self._touching.done():
            self._touching = self._in_background(self._touch, self._identity, jobs)

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
        """Write what is pending, and end the threads."""
        for threads in (self._writer, self._readers):
            await asyncio.to_thread(threads.shutdown)

    async def _read(self, jobs: Sequence[Job]) -> dict[Job, PromptEmbeds]:
        loop = asyncio.get_running_loop()
        reads = {loop.run_in_executor(self._readers, self._load, self._identity, job): job for job in jobs}
        if not reads:
            return {}
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

    # On threads: a key takes a millisecond where a prompt is long.

    def _load(self, identity: str, job: Job) -> PromptEmbeds | None:
        return self._folder.read(result_key(identity, job))

    def _store(self, identity: str, job: Job, result: PromptEmbeds) -> None:
        self._folder.write(result_key(identity, job), result)

    def _touch(self, identity: str, jobs: Sequence[Job]) -> None:
        self._folder.touch([result_key(identity, job) for job in jobs])

    def _in_background(self, work: Callable[..., None], *args: object) -> Future[None]:
        future = asyncio.get_running_loop().run_in_executor(self._writer, work, *args)
        future.add_done_callback(lambda done: self._count_error(error) if (error := done.exception()) else None)
        return future

    def _count_error(self, error: BaseException) -> None:
        """Count an error. Log it, unless errors have been logged since a write last succeeded."""
        self._errors += 1
        if not self._warned:
            self._warned = True
            log.warning("cache in %s: %s. Requests are served without it where it fails.", self._folder.path, error)
