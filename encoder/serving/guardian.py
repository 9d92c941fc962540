"""Watches the model, and replaces it where it is broken.

The one place that decides whether requests are served: it has the state (state.py) and the model that is loaded now
(generation.py). What it hears it acts on at once: whoever waits for a broken model is answered, and what comes is
refused. What takes time is done by one task, whose loop reads as the table of states.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from encoder.errors import NotReady
from encoder.serving.generation import Generation
from encoder.serving.state import EngineState

logger = logging.getLogger(__name__)
T = TypeVar("T")

TICK_S = 0.25
RESTART_S = 3  # until a supervisor has started another process, which then says itself how long it loads
FIRST_LOAD_S = 2.0  # assumed until a load has been measured
LONGEST_RETRY_S = 10
LOAD_LIMIT_FACTOR = 5  # a restart may take so many times as long as the last load, and a minute more
# A model that breaks sooner after a restart, without having run a batch, would break again.
MIN_UPTIME_S = 60.0
END_S = 1.0  # for the thread of an engine that has failed to end

Notify = Callable[[Generation, str], None]


class Guardian:
    """Starts a model, watches it, replaces it.

    Args:
        make_generation: makes a model that is not loaded yet, from what to call when it fails and when its thread ends.
        stall_s: a step on the model thread that takes longer, in seconds, will never end.
    Attributes:
        state: of the engine.
        failed: set once the state is `failed`.
        restarts, probes_failed: counters since the start.
    """

    def __init__(self, make_generation: Callable[[Notify, Notify], Generation], stall_s: float) -> None:
        self._make_generation = make_generation
        self._stall_s = stall_s
        self._news = asyncio.Event()  # the state has changed
        self.state = EngineState(self._news.set)
        self.failed = asyncio.Event()
        self.restarts = self.probes_failed = 0
        self.generation: Generation | None = None  # that is loaded, or loading
        self._past: dict[str, int] = {}  # what the models before this one have counted
        self._load_s = FIRST_LOAD_S
        self._load_began_at = time.monotonic()
        self._restarted_at = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._closed: NotReady | None = None

    async def start(self) -> None:
        """Load the model, and watch it from then on. Errors: CheckpointError, ModelFailure, and what MLX raises."""
        try:
            await self._bring_up(limit_s=math.inf)
        except Exception as error:  # whatever it is, all requests and probes get it as the reason from now on
            self._give_up(f"The model could not be loaded: {error}")
            raise
        self._task = asyncio.create_task(self._watch())
        self._task.add_done_callback(self._on_watch_end)

    async def close(self) -> None:
        """End the model thread; requests that still wait fail with NotReady.

        Errors: TimeoutError if the thread does not end: within `stall_s`, or a second where the engine has failed.
        """
        self._closed = NotReady("The service was closed.", RESTART_S)
        if self.generation is not None:
            self.generation.close(self._closed)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self.generation is not None:
            limit_s = END_S if self.state.name == "failed" else max(END_S, self._stall_s)
            await asyncio.wait_for(self.generation.thread.ended(), limit_s)

    def serving(self) -> Generation:
        """The model, for a request. Errors: NotReady with the reason."""
        if self._closed is not None or self.generation is None or not self.state.serves:
            raise self._refusal()
        return self.generation

    def stats(self) -> dict[str, int]:
        """Gauges of this model and counters since the start, by the names of EngineStats."""
        if self.generation is None:
            return self._past
        return self.generation.stats() | self._counters()

    def _counters(self) -> dict[str, int]:
        """What all models have counted."""
        assert self.generation is not None
        return {name: count + self._past.get(name, 0) for name, count in self.generation.counters().items()}

    # The task.

    async def _watch(self) -> None:
        while True:
            match self.state.name:
                case "failed":
                    return
                case "restarting":
                    await self._replace()
                case "suspect":
                    await self._probe()
                case _:
                    await self._tick()

    async def _tick(self) -> None:
        """Wait for a change of state, but no longer than a tick."""
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), TICK_S)
        except TimeoutError:
            self._look()

    async def _probe(self) -> None:
        """Find out whether the model works after all."""
        assert self.generation is not None, "a state that serves has a model"
        try:
            await self._until(self.generation.probe(), self._stall_s)
        except Exception as error:  # noqa: BLE001  # whatever it is, a request would get it as well
            self.probes_failed += 1
            self._condemn(f"{self.state.reason} Then a probe failed: {error}")
        else:
            self.state.on("works", "A probe went through every step.")

    async def _replace(self) -> None:
        """Load the model again, on a new thread, once the old one and its memory are gone."""
        self.restarts += 1
        self._load_began_at = time.monotonic()
        why = self.state.reason
        try:
            if self.generation is not None:
                await self._until(self.generation.thread.ended(), self._stall_s)
                self.generation.release()
                self._past, self.generation = self._counters(), None
            await self._bring_up(limit_s=LOAD_LIMIT_FACTOR * self._load_s + 60)
        except Exception as error:  # noqa: BLE001  # whatever it is, it would come again
            self._give_up(f"{why} The model could not be loaded again: {error}")
        self._restarted_at = time.monotonic()

    async def _bring_up(self, limit_s: float) -> None:
        """Load a model, and run a job through every step of a request."""
        self._load_began_at = started_at = time.monotonic()
        self.generation = generation = self._make_generation(self._on_failure, self._on_thread_end)
        await self._until(generation.load(), limit_s)
        await self._until(generation.probe(), self._stall_s)
        self._load_s = time.monotonic() - started_at
        self.state.on("works", f"The model was loaded in {self._load_s:.1f} s.")  # last: now requests are accepted

    async def _until(self, work: Awaitable[T], limit_s: float) -> T:
        """The result of some work. Looks after the model meanwhile.

        Args:
            work: to wait for; it is cancelled where it takes too long.
            limit_s: in ticks, so that time in which the process was suspended does not count.
        Errors: TimeoutError, and those of the work.
        """
        task = asyncio.ensure_future(work)
        try:
            ticks = 0
            while not (await asyncio.wait([task], timeout=TICK_S))[0]:
                self._look()
                ticks += 1
                if self.state.name == "failed":
                    raise TimeoutError(self.state.reason)
                if ticks * TICK_S >= limit_s:
                    raise TimeoutError(f"No result within {limit_s:g} s.")
            return task.result()
        finally:
            task.cancel()

    # What is heard, and acted on at once.

    def _look(self) -> None:
        """A tick has passed: see what nobody tells."""
        if self.generation is None:
            return
        if self.generation.thread.is_gone:
            self.generation.thread.hear_of_its_end()
        batch_loop, tokenizing = self.generation.batch_loop, self.generation.tokenizing
        batch_loop.catch_up()
        limit_s = max(self._stall_s, batch_loop.pulse.patience_s)
        if batch_loop.stall.tick() * TICK_S >= limit_s:
            step = batch_loop.pulse.step
            self._give_up(f"The model thread has been in one step for more than {limit_s:.3g} s: {step}.")
        if tokenizing.tick() * TICK_S >= self._stall_s:
            self._give_up(f"A call of the tokenizer has not returned for more than {self._stall_s:g} s.")

    def _on_failure(self, generation: Generation, reason: str) -> None:
        if generation is self.generation:
            self.state.on("failure", reason)

    def _on_thread_end(self, generation: Generation, reason: str) -> None:
        if generation is self.generation and self._closed is None:
            self._condemn(reason)

    def _condemn(self, reason: str) -> None:
        """The model is broken: answer all that wait for it, and have it replaced, unless that was done in vain."""
        assert self.generation is not None, "only a model can break"
        if self.state.serves and self._broke_again():
            self._give_up(f"{reason} It had just been loaded again.")
        elif self.state.on("breaks", reason):
            self.generation.close(self._refusal())
        else:  # it has never served; whoever loads it gets the reason
            self.generation.close(NotReady(reason, RESTART_S))

    def _broke_again(self) -> bool:
        assert self.generation is not None, "only a model can break"
        runs_s = time.monotonic() - self._restarted_at
        return runs_s < MIN_UPTIME_S and not self.generation.counters()["batches"]

    def _give_up(self, reason: str) -> None:
        """Answer all that wait, and serve no more."""
        if self.state.on("gives_up", reason):
            if self.generation is not None:
                self.generation.close(self._refusal())
            self.failed.set()

    def _on_watch_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("The guardian of the model ended.", exc_info=error)
            self._give_up(f"The guardian of the model ended: {error!r}.")

    def _refusal(self) -> NotReady:
        """What a request gets in this state."""
        passed_s = time.monotonic() - self._load_began_at
        # A load that takes longer than the last one is likely to take half as long again as it has taken.
        again_s = math.ceil(min(max(1, self._load_s - passed_s, passed_s / 2), LONGEST_RETRY_S))
        match self.state.name:
            case "loading":
                return NotReady("The model is still loading.", again_s)
            case "restarting":
                return NotReady(f"The model is being loaded again. {self.state.reason}", again_s)
            case "failed":
                return NotReady(self.state.reason, RESTART_S)
            case _:
                return NotReady("The service was closed.", RESTART_S)
