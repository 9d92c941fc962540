"""The states of the engine, and what the guardian does in them, whatever happens in whatever order."""

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from encoder.errors import ModelFailure, NotReady
from encoder.serving import guardian
from encoder.serving.guardian import Guardian
from encoder.serving.state import TRANSITIONS, EngineState


def test_every_state_is_reached_and_only_failed_is_left_by_nothing() -> None:
    targets = {target for transitions in TRANSITIONS.values() for target in transitions.values()}

    assert targets | {"loading"} == set(TRANSITIONS)
    assert [name for name, transitions in TRANSITIONS.items() if not transitions] == ["failed"]


def test_an_event_without_a_transition_changes_nothing() -> None:
    changes: list[str] = []
    state = EngineState(lambda: changes.append(state.name))

    assert not state.on("failure", "while it loads")
    assert (state.name, changes) == ("loading", [])
    assert state.on("works", "loaded") and state.reason == "loaded"
    assert (state.name, changes) == ("ready", ["ready"])


class Scripted:
    """Stands for a loaded model: each of its steps ends when the test says so."""

    def __init__(self, on_failure: Any, on_end: Any) -> None:
        loop = asyncio.get_running_loop()
        self.on_failure, self.on_end = on_failure, on_end
        self.loaded: asyncio.Future[None] = loop.create_future()
        self.probed: asyncio.Future[None] | None = None
        self.has_ended = asyncio.Event()
        self.refusal: NotReady | None = None
        self.stalled = False
        self.released = False
        self.batches = 0
        self.thread = self.batch_loop = self.tokenizing = self.pulse = self.stall = self
        self.is_gone, self.patience_s, self.step = False, 0.0, "collect"

    async def load(self) -> None:
        await self.loaded

    async def probe(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.probed = asyncio.get_running_loop().create_future()
        await self.probed

    def close(self, error: NotReady) -> None:
        self.refusal = self.refusal or error
        if self.probed is not None and not self.probed.done():
            self.probed.set_exception(error)

    async def ended(self) -> None:
        await self.has_ended.wait()

    def release(self) -> None:
        self.released = True

    def tick(self) -> int:
        return 10**9 if self.stalled else 0

    def catch_up(self) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {"batches": self.batches}

    def end_thread(self) -> None:
        """As a thread does: it says so once."""
        if not self.has_ended.is_set():
            self.has_ended.set()
            self.on_end(self, "The thread ended.")


MOSTLY = st.sampled_from([True, True, True, True, False])  # else few models would live to see anything


class Model(RuleBasedStateMachine):
    """A guardian and its models, with a clock of its own: the loop runs when something has happened."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.models: list[Scripted] = []
        self.tick_s, guardian.TICK_S = guardian.TICK_S, 1e-6
        self.seen: list[str] = ["loading"]

    @initialize(up=MOSTLY)
    def start(self, up: bool) -> None:
        async def start() -> None:
            self.guardian = Guardian(self.make, stall_s=5)  # type: ignore[arg-type]
            note = self.guardian.state._on_change

            def on_change() -> None:
                self.seen.append(self.guardian.state.name)
                note()

            self.guardian.state._on_change = on_change
            self.starting = asyncio.ensure_future(self.guardian.start())
            self.starting.add_done_callback(lambda task: task.cancelled() or task.exception())

        self.loop.run_until_complete(start())
        self.settle()
        if up:
            self.it_comes_up_and_runs(batches=1)

    def make(self, on_failure: Any, on_end: Any) -> Any:
        self.models.append(Scripted(on_failure, on_end))
        return self.models[-1]

    def settle(self) -> None:
        """Let the event loop do what is due."""
        self.loop.run_until_complete(asyncio.sleep(0.002))

    @property
    def current(self) -> Scripted:
        return self.models[-1]

    @rule(batches=st.integers(0, 1))
    def it_comes_up_and_runs(self, batches: int) -> None:
        """The usual course."""
        if not self.current.loaded.done():
            self.load_ends(works=True)
        if self.current.probed is not None and not self.current.probed.done():
            self.probe_ends(works=True)
        if self.guardian.state.serves:
            self.current.batches += batches

    @rule(works=MOSTLY)
    @precondition(lambda self: not self.current.loaded.done())
    def load_ends(self, works: bool) -> None:
        if works:
            self.current.loaded.set_result(None)
        else:
            self.current.loaded.set_exception(ModelFailure("no memory"))
        self.settle()

    @rule(works=st.booleans())
    @precondition(lambda self: self.current.probed is not None and not self.current.probed.done())
    def probe_ends(self, works: bool) -> None:
        assert self.current.probed is not None
        if works:
            self.current.probed.set_result(None)
        else:
            self.current.probed.set_exception(ModelFailure("not finite"))
        self.settle()

    @rule(which=st.integers(0, 3))
    def a_failure_is_reported(self, which: int) -> None:
        """Perhaps by a model that has been replaced."""
        model, before = self.models[-1 - which % len(self.models)], len(self.seen)
        model.on_failure(model, "It raised.")
        self.settle()
        assert model is self.current or len(self.seen) == before

    @rule()
    @precondition(lambda self: self.current.loaded.done())
    def the_thread_ends(self) -> None:
        self.current.end_thread()
        self.settle()

    @rule(which=st.integers(1, 3))
    @precondition(lambda self: len(self.models) > 1)
    def an_earlier_thread_is_heard_of_again(self, which: int) -> None:
        model, before = self.models[max(0, len(self.models) - 1 - which)], len(self.seen)
        model.on_end(model, "The thread ended.")
        self.settle()
        assert len(self.seen) == before

    @rule()
    @precondition(lambda self: len(self.seen) > 4)
    def a_step_hangs(self) -> None:
        self.current.stalled = True
        self.settle()
        assert self.guardian.state.name == "failed"

    @invariant()
    def only_transitions_of_the_table_happen(self) -> None:
        for before, after in zip(self.seen, self.seen[1:], strict=False):
            assert after in TRANSITIONS[before].values()  # type: ignore[index]

    @invariant()
    def a_model_serves_only_while_it_is_open(self) -> None:
        if not self.models:
            return
        if self.guardian.state.serves:
            assert self.guardian.serving() is self.current
            assert self.current.refusal is None
        else:
            with pytest.raises(NotReady):
                self.guardian.serving()

    @invariant()
    def whoever_waits_for_a_model_that_is_given_up_is_answered(self) -> None:
        for model in self.models[:-1]:
            assert model.refusal is not None and model.released
        if self.models and self.guardian.state.name == "failed":
            assert self.current.refusal is not None
            assert self.guardian.failed.is_set()

    @invariant()
    def no_model_is_loaded_before_the_thread_of_the_last_has_ended(self) -> None:
        assert all(model.has_ended.is_set() for model in self.models[:-1])

    def teardown(self) -> None:
        async def close() -> None:
            for model in self.models:
                model.has_ended.set()
            self.starting.cancel()
            await self.guardian.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.wait([*others, asyncio.ensure_future(asyncio.sleep(0))])

        if self.models:
            self.loop.run_until_complete(close())
        self.loop.close()
        guardian.TICK_S = self.tick_s


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
