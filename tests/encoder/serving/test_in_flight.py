"""Whatever happens to entries, and in whatever order: who waits for one is told once it is settled, and nobody joins
one that is."""

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from encoder.errors import ModelFailure, NotReady
from encoder.serving.cache import ResultCache
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.serving.in_flight import InFlight
from tests.encoder.serving.cache.test_memory import make_job, make_result

BYTES = 3_000  # of the cache: two results


class Entries(RuleBasedStateMachine):
    """Entries of a few jobs, and tasks that wait for them."""

    entries = Bundle("entries")
    waiters = Bundle("waiters")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.cache = ResultCache(BYTES, None, 1)
        self.in_flight = InFlight(self.cache, Health())
        self.added: list[Entry] = []
        self.forgotten: set[Entry] = set()
        self.waiting: dict[asyncio.Task[None], list[Entry]] = {}

    def teardown(self) -> None:
        for task in self.waiting:
            task.cancel()
        self.run()
        self.loop.close()

    def run(self) -> None:
        """Let every task go as far as it can."""
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    @rule(target=entries, job=st.integers(0, 3), joinable=st.booleans(), store=st.booleans())
    def add(self, job: int, joinable: bool, store: bool) -> Entry:
        entry = Entry(make_job(job), store=store)
        if self.in_flight.find(entry.job) is not None:
            joinable = False  # who finds an entry joins it
        self.in_flight.add([entry], joinable=joinable)
        self.added.append(entry)
        return entry

    @rule(target=waiters, wanted=st.lists(entries, min_size=1, max_size=3, unique_by=id))
    def wait(self, wanted: list[Entry]) -> "asyncio.Task[None]":
        wanted = [entry for entry in wanted if entry not in self.forgotten]
        task = self.loop.create_task(self.in_flight.wait(wanted, timeout_s=None))
        self.waiting[task] = wanted
        self.run()
        return task

    @rule(task=consumes(waiters))
    def leave(self, task: "asyncio.Task[None]") -> None:
        """The client of a request disconnects."""
        task.cancel()
        self.run()
        self.waiting.pop(task, None)

    @rule(entry=entries)
    def deliver(self, entry: Entry) -> None:
        self.in_flight.deliver(entry, make_result(400))
        self.run()

    @rule(entry=entries)
    def fail(self, entry: Entry) -> None:
        self.in_flight.fail([entry], ModelFailure("It failed."))
        self.run()

    @rule(entry=entries)
    def forget(self, entry: Entry) -> None:
        """As the queue does, where nobody waits."""
        if not entry.waiters:
            self.in_flight.forget(entry)
            self.forgotten.add(entry)

    @rule(entry=entries)
    def break_down(self, entry: Entry) -> None:
        with self.in_flight.error_boundary([entry]):
            raise SystemExit
        self.run()

    @rule()
    def close(self) -> None:
        self.in_flight.close(NotReady("The model is gone.", 1))
        self.run()

    @invariant()
    def who_waits_for_settled_entries_is_told(self) -> None:
        for task, wanted in self.waiting.items():
            assert task.done() == all(entry.outcome is not None for entry in wanted)

    @invariant()
    def settled_entries_hold_nobody(self) -> None:
        waiters = [waiter for entry in self.added if entry.outcome is not None for waiter in entry.waiters]
        assert all(waiter.done() for waiter in waiters)

    @invariant()
    def only_unsettled_entries_are_kept(self) -> None:
        kept = [entry for entry in self.added if entry.outcome is None and entry not in self.forgotten]
        assert len(self.in_flight) == len(kept)
        for job in range(4):
            found = self.in_flight.find(make_job(job))
            assert found is None or found in kept


TestEntries = Entries.TestCase
TestEntries.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
