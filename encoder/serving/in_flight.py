"""The entries that have been asked for and are not settled. Belongs to the event loop.

Every entry is settled exactly once, with its result or with an error, whatever happens.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from encoder.errors import EncoderError, ModelFailure, NotReady
from encoder.pipeline.selection import Outcome
from encoder.serving.cache import ResultCache
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.types import Job, PromptEmbeds


class InFlight:
    """Entries that are looked up, wait in the queue, or run.

    Args:
        cache: keeps the results of entries that may be stored.
        health: hears of unexpected failures.
    """

    def __init__(self, cache: ResultCache, health: Health) -> None:
        self._cache = cache
        self._health = health
        self._closed = False
        self._unsettled: set[Entry] = set()
        self._joinable: dict[Job, Entry] = {}  # those of them that other requests for the same job may join

    def __len__(self) -> int:
        return len(self._unsettled)

    def add(self, entries: Sequence[Entry], *, joinable: bool) -> None:
        """Entries that are looked up or queued from now on."""
        self._unsettled.update(entries)
        if joinable:
            self._joinable.update((entry.job, entry) for entry in entries)

    def find(self, job: Job) -> Entry | None:
        """The entry of an equal job that a request may join, or None."""
        return self._joinable.get(job)

    @contextmanager
    def error_boundary(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Contain an unexpected exception on the event loop: it fails these entries and no others."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.fail(entries, NotReady("The service was closed.", 10))
            raise
        # Whatever it is, the requests that wait for these entries must get an answer, and a SystemExit that went on
        # from here would end the event loop, and with it all other requests.
        except BaseException as error:  # noqa: BLE001
            self._health.report("Requests failed on the event loop.", error)
            self.fail(entries, ModelFailure(f"The request failed: {error!r}. The log has the details."))

    def deliver(self, entry: Entry, outcome: Outcome) -> None:
        """Settle an entry that has run, and cache its result.

        A model that has been given up may still deliver: then the entry has its outcome, and the cache is another's.
        """
        if isinstance(outcome, PromptEmbeds) and (entry.store or entry.is_probe):
            outcome = outcome.detach()
        self.settle(entry, outcome)
        if isinstance(outcome, PromptEmbeds) and entry.store and not self._closed:
            self._cache.put(entry.job, outcome)

    def settle(self, entry: Entry, outcome: Outcome) -> None:
        """Give an entry its outcome, unless it has one, and resolve its waiters."""
        self.forget(entry)
        if entry.outcome is None:
            entry.outcome = outcome
        _resolve(entry.waiters)

    def fail(self, entries: Iterable[Entry], error: EncoderError) -> None:
        """Settle entries with an error."""
        for entry in entries:
            self.settle(entry, error)

    def close(self, error: EncoderError) -> None:
        """Settle all entries with an error, and cache nothing more. Needs no other method, since one may be broken."""
        self._closed = True
        for entry in self._unsettled:
            entry.outcome = entry.outcome or error
            _resolve(entry.waiters)
        self._unsettled.clear()
        self._joinable.clear()

    def forget(self, entry: Entry) -> None:
        """Drop an entry that is settled, or that no request wants any more."""
        self._unsettled.discard(entry)
        if self._joinable.get(entry.job) is entry:
            del self._joinable[entry.job]

    async def wait(self, entries: Sequence[Entry], timeout_s: float | None) -> None:
        """Return when all entries are settled, or after the timeout, where there is one."""
        unsettled = [entry for entry in entries if entry.outcome is None]
        if not unsettled:
            return
        loop = asyncio.get_running_loop()
        waiters = [loop.create_future() for _ in unsettled]
        for entry, waiter in zip(unsettled, waiters, strict=True):
            entry.waiters.append(waiter)
        timer = loop.call_later(timeout_s, _resolve, waiters) if timeout_s is not None else None
        try:
            for waiter in waiters:
                await waiter
        finally:
            if timer is not None:
                timer.cancel()
            for entry, waiter in zip(unsettled, waiters, strict=True):
                entry.waiters.remove(waiter)


def _resolve(waiters: Sequence[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
