"""Entries that run together, and the steps of their forward pass. Knows nothing of queues."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from encoder.errors import ModelFailure
from encoder.pipeline.selection import Outcome
from encoder.serving.entry import Entry
from encoder.serving.health import Health
from encoder.serving.pulse import Pulse
from encoder.text_encoder import BegunBatch, DispatchedBatch, TextEncoder
from encoder.types import PromptEmbeds


@dataclass(slots=True, eq=False)
class Batch:
    """Entries that run together. Belongs to the model thread until its outcomes are delivered.

    Times are in seconds of time.perf_counter.

    Attributes:
        entries: that run together.
        begun, dispatched: its forward pass after the first and after the second step.
        outcomes: one for each entry, after the last step.
        error: the exception that ended it, or None.
        begun_at: when its first step began; the device may still have computed the batch before it.
        started_at: when the device was free for it.
        finished_at: when its outcomes were there.
    """

    entries: list[Entry] = field(default_factory=list)
    begun: BegunBatch | None = None
    dispatched: DispatchedBatch | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    error: BaseException | None = None
    begun_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0

    def release(self) -> None:
        """Release the memory of its forward pass, which the traceback of its error may hold as well."""
        self.begun = self.dispatched = None
        if self.error is not None:
            self.error = self.error.with_traceback(None)


class BatchRunner:
    """Takes the steps of batches on the model thread. Once a step has failed, the later steps do nothing.

    Args:
        encoder: runs the batches.
        health: hears of unexpected failures, and of results that are not finite.
        pulse: is told of each step.
    """

    def __init__(self, encoder: TextEncoder, health: Health, pulse: Pulse) -> None:
        self._encoder = encoder
        self._health = health
        self._pulse = pulse
        self._last_finished_at = 0.0

    @contextmanager
    def error_boundary(self, task: str, batch: Batch | None = None) -> Iterator[None]:
        """Contain an unexpected exception on the model thread: it ends this batch and no other.

        Args:
            task: what the thread is about to do, for the log.
            batch: gets the error; None where the task belongs to no batch.
        """
        try:
            yield
        # The thread must survive any exception, because other batches wait for it.
        except BaseException as error:  # noqa: BLE001
            if batch is not None:
                batch.error = error
            self._health.report(f"The model thread could not {task}.", error)

    def begin(self, batch: Batch) -> None:
        """The first step, see `TextEncoder.begin`."""
        batch.begun_at = time.perf_counter()
        self._attempt("begin", batch, self._begin)

    def dispatch(self, batch: Batch) -> None:
        """The second step, see `TextEncoder.dispatch`."""
        self._attempt("dispatch", batch, self._dispatch)

    def collect(self, batch: Batch) -> None:
        """The third step, see `TextEncoder.collect`."""
        self._attempt("collect", batch, self._collect)

    def _attempt(self, name: str, batch: Batch, step: Callable[[Batch], None]) -> None:
        if batch.error is None:
            self._pulse.begin(name)
            with self.error_boundary(f"{name} a batch of {len(batch.entries)} prompts", batch):
                step(batch)

    def _begin(self, batch: Batch) -> None:
        batch.begun = self._encoder.begin([entry.job for entry in batch.entries])

    def _dispatch(self, batch: Batch) -> None:
        assert batch.begun is not None
        batch.dispatched = self._encoder.dispatch(batch.begun)

    def _collect(self, batch: Batch) -> None:
        assert batch.dispatched is not None
        outcomes, last_pass = self._encoder.collect(batch.dispatched)
        batch.outcomes = [
            _detach_if_large(outcome) if entry.store or entry.is_probe else outcome
            for entry, outcome in zip(batch.entries, outcomes, strict=True)
        ]
        for outcome in outcomes:
            if isinstance(outcome, ModelFailure):  # the others of its batch are right, or cannot be told from that
                self._health.report("A result is not finite.", outcome)
        batch.started_at, batch.finished_at = max(batch.begun_at, self._last_finished_at), time.perf_counter()
        self._last_finished_at = batch.finished_at
        for entry in batch.entries:
            entry.started_at, entry.finished_at, entry.last_pass = batch.started_at, batch.finished_at, last_pass


def _detach_if_large(outcome: Outcome) -> Outcome:
    """Copy a large result on the model thread: a copy on the event loop would hold up other requests."""
    return outcome.detach() if isinstance(outcome, PromptEmbeds) and outcome.is_large else outcome
