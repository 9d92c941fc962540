"""The two tiers as one cache. Belongs to the event loop."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

from encoder.serving.cache.disk import DiskCache
from encoder.serving.cache.folder import ResultFolder
from encoder.serving.cache.key import model_identity
from encoder.serving.cache.memory import MemoryCache
from encoder.text_encoder import TextEncoder
from encoder.types import Job, PromptEmbeds


class ResultCache:
    """Results of one loaded model.

    Args:
        memory_bytes: bound of the memory tier; 0 keeps nothing there.
        folder: for results that outlive the process; None has no such tier.
        disk_bytes: bound of the folder.
    """

    def __init__(self, memory_bytes: int, folder: Path | None, disk_bytes: int) -> None:
        self._memory = MemoryCache(memory_bytes)
        self._folder = None if folder is None else ResultFolder(folder, disk_bytes)
        self._disk: DiskCache | None = None  # once the model is known

    async def open(self, encoder: TextEncoder) -> None:
        """Keep the results of this model from now on. Errors: OSError as in `model_identity`.

        Where another model was open before, memory is emptied: what a broken model has computed is not trusted, and its
        files may have changed since it was loaded. On disk each model has its own results.
        """
        self._memory.clear()
        if self._folder is None:
            return
        identity = await asyncio.to_thread(model_identity, encoder)
        if self._disk is None:
            self._disk = DiskCache(self._folder, identity)
            self._disk.open()
        else:
            self._disk.change_model(identity)

    async def close(self) -> None:
        """Write the results that wait to be written."""
        if self._disk is not None:
            await self._disk.close()

    @property
    def has_disk(self) -> bool:
        """Whether there is a folder to search."""
        return self._disk is not None

    def get_from_memory(self, jobs: Iterable[Job]) -> dict[Job, PromptEmbeds]:
        """The results that are in memory."""
        found = {job: result for job in jobs if (result := self._memory.get(job)) is not None}
        if self._disk is not None and found:
            self._disk.touch(list(found))
        return found

    async def find_on_disk(self, jobs: Sequence[Job]) -> dict[Job, PromptEmbeds]:
        """The results that are on disk. From now on they are in memory as well."""
        found = await self._disk.find(jobs) if self._disk is not None else {}
        for job, result in found.items():
            self._memory.put(job, result)
        return found

    def put(self, job: Job, result: PromptEmbeds) -> None:
        """Keep a result, in place of an older one."""
        self._memory.put(job, result)
        if self._disk is not None:
            self._disk.write(job, result)

    def stats(self) -> dict[str, int]:
        """Gauges and counters by the names of EngineStats."""
        memory = {
            "cache_bytes": self._memory.bytes,
            "cache_entries": len(self._memory),
            "cache_evictions": self._memory.evictions,
        }
        return memory | (self._disk.stats() if self._disk is not None else {})
