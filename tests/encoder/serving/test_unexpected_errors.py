"""A fault at any step of a request: nobody hangs, everyone gets the right error, and the engine recovers or fails."""

import asyncio
import contextlib
import pkgutil
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from encoder.errors import EncoderError, ModelFailure, NotReady
from encoder.options import ModelOptions
from encoder.presets.built_in import LAST_HIDDEN_STATE
from encoder.presets.preset import Preset
from encoder.serving import batch_loop, guardian
from encoder.serving.engine import Engine
from encoder.text_encoder import BegunBatch, DispatchedBatch, TextEncoder
from encoder.types import EncodeResult, Job, TokenizedPrompt

pytestmark = pytest.mark.anyio

SHORT = replace(LAST_HIDDEN_STATE, max_sequence_length=64)
PROMPT = (f"prompt {number}" for number in count())  # a new one each time, so none is in the cache

SERVING = "encoder.serving"
# Before the request has entries, so that no other request is concerned.
OWN_STEPS = [
    pytest.param(f"{SERVING}.recent_tokens.RecentTokens.get", id="recent-tokens"),
    pytest.param("encoder.text_encoder.TextEncoder.tokenize", id="tokenize"),
    pytest.param(f"{SERVING}.recent_tokens.RecentTokens.put", id="keep-the-tokens"),
    pytest.param("encoder.text_encoder.TextEncoder.plan", id="plan"),
    pytest.param("encoder.pipeline.limits.Limits.check_output", id="check-the-output"),
    pytest.param(f"{SERVING}.cache.ResultCache.get_from_memory", id="ask-the-memory"),
    pytest.param(f"{SERVING}.in_flight.InFlight.find", id="find-an-entry"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop.check", id="check-the-size"),
]
# Once it has, and others may have joined them: on the event loop.
LOOP_STEPS = [
    pytest.param(f"{SERVING}.in_flight.InFlight.add", id="register-the-entries"),
    pytest.param(f"{SERVING}.cache.ResultCache.find_on_disk", id="look-up"),
    pytest.param(f"{SERVING}.cache.disk.DiskCache._read", id="read-the-disk"),
    pytest.param(f"{SERVING}.batcher.Batcher.put", id="queue"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._wake", id="wake-the-thread"),
    pytest.param("encoder.types.PromptEmbeds.detach", id="copy-on-the-loop"),
    pytest.param(f"{SERVING}.in_flight.InFlight.deliver", id="deliver"),
    pytest.param(f"{SERVING}.cache.ResultCache.put", id="cache"),
    pytest.param(f"{SERVING}.cache.memory.MemoryCache.put", id="cache-in-memory"),
    pytest.param(f"{SERVING}.cache.disk.DiskCache.write", id="cache-on-disk"),
    pytest.param(f"{SERVING}.in_flight.InFlight.settle", id="settle"),
    pytest.param(f"{SERVING}.in_flight._resolve", id="resolve-the-waiters"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._count", id="count"),
]
# On the model thread: those of a batch, and those that end the thread.
BATCH_STEPS = [
    pytest.param(f"{SERVING}.batcher.Batcher.take_batch", id="take-a-batch"),
    pytest.param("encoder.text_encoder.TextEncoder.begin", id="begin"),
    pytest.param("encoder.text_encoder.TextEncoder.dispatch", id="dispatch"),
    pytest.param("encoder.text_encoder.select", id="select"),
    pytest.param("encoder.text_encoder.TextEncoder.collect", id="collect"),
    pytest.param("encoder.text_encoder.export", id="export"),
    pytest.param(f"{SERVING}.batch._detach_if_large", id="copy-on-the-thread"),
]
THREAD_STEPS = [
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._take", id="take"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._rest", id="rest"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._hand_over", id="hand-over"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._call_on_loop", id="call-the-loop"),
]
MODEL_STEPS = BATCH_STEPS + THREAD_STEPS
# The probe takes these steps, so an engine in which they keep failing is not ready.
PROBED = [
    step
    for step in [*LOOP_STEPS, *MODEL_STEPS]
    if step.id in ("register-the-entries", "wake-the-thread", "deliver", "settle", "call-the-loop")
    or step in MODEL_STEPS
]


class Unexpected(BaseException):
    """Not even an Exception."""


ERRORS = [pytest.param(error, id=error.__name__) for error in (MemoryError, SystemExit, Unexpected)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def started(model: ModelOptions, folder: Path, **options: Any) -> AsyncIterator[Engine]:
    """With a disk cache, so that every step exists."""
    engine = Engine(model, disk_cache_dir=folder / "results", **options)
    await engine.start()
    try:
        yield engine
    finally:
        with contextlib.suppress(TimeoutError):  # its thread hangs
            await engine.close()


@pytest.fixture(scope="module")
async def engine(model: ModelOptions, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    async with started(model, tmp_path_factory.mktemp("engine")) as engine:
        yield engine


class Fault:
    """Makes a step do something else first: once, or, while `lasts` is true, each time."""

    def __init__(self, patch: pytest.MonkeyPatch, step: str, act: Callable[[], object], *, lasts: bool = False) -> None:
        path, _, name = step.rpartition(".")
        owner = pkgutil.resolve_name(path)
        original = getattr(owner, name)
        self.lasts, self.acted = lasts, 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.lasts or not self.acted:
                self.acted += 1
                act()
            return original(*args, **kwargs)

        patch.setattr(owner, name, faulty)


def raising(error: type[BaseException]) -> Callable[[], object]:
    def act() -> None:
        raise error("an unexpected error")

    return act


def left_behind(engine: Engine) -> dict[str, int]:
    """What is still there when no request is being served, and should not be."""
    stats, generation = engine.stats(), engine._guardian.generation
    left = {
        "unsettled": len(generation.in_flight),
        "joinable": len(generation.in_flight._joinable),
        "queued": stats.queued_prompts,
        "queued tokens": stats.queued_tokens,
        "running": stats.running_prompts,
        "finished": len(generation.batch_loop._finished),
    }
    return {name: number for name, number in left.items() if number}


async def reached(engine: Engine, *states: str) -> None:
    """Return when the engine is in one of these states."""
    async with asyncio.timeout(30):
        while engine.state not in states:
            await asyncio.sleep(0.001)


async def outcomes_of(*requests: "asyncio.Task[EncodeResult]") -> list[Any]:
    """The result or the error of each request, soon: none may wait for its own deadline."""
    _, pending = await asyncio.wait(requests, timeout=30)
    assert not pending, "a request hangs"
    return [request.exception() or request.result() for request in requests]


def ask(engine: Engine, *prompts: str) -> "asyncio.Task[EncodeResult]":
    return asyncio.create_task(engine.encode(prompts or [next(PROMPT)], SHORT))


async def served(engine: Engine, *prompts: str) -> None:
    """Return once these prompts are answered; a thread may be about to end, which nobody has heard of yet."""
    async with asyncio.timeout(30):
        while isinstance((await outcomes_of(ask(engine, *prompts)))[0], NotReady):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", [*LOOP_STEPS, *MODEL_STEPS])
async def test_a_fault_that_passes_fails_what_it_concerns_and_leaves_nothing_behind(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    """All requests for the prompt end at once, also those that arrive meanwhile, and the engine is ready again."""
    prompt = next(PROMPT)
    monkeypatch.setattr(guardian, "MIN_UPTIME_S", 0)  # the engine serves one fault after the other
    fault = Fault(monkeypatch, step, raising(error))
    requests = [ask(engine, prompt) for _ in range(3)]
    await asyncio.sleep(0)
    requests += [ask(engine, prompt), ask(engine)]
    outcomes = await outcomes_of(*requests)

    assert all(isinstance(outcome, EncodeResult | ModelFailure | NotReady) for outcome in outcomes)
    async with asyncio.timeout(30):  # the thread may rest after all are answered
        while not fault.acted:
            await asyncio.sleep(0.001)
    await served(engine, prompt, next(PROMPT))
    await reached(engine, "ready")
    assert fault.acted == 1
    assert not left_behind(engine)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", OWN_STEPS)
async def test_a_fault_before_a_request_has_entries_fails_that_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    prompt = next(PROMPT)
    fault = Fault(monkeypatch, step, raising(error))
    failed, answered = await outcomes_of(ask(engine, prompt), ask(engine, prompt))

    assert fault.acted == 1
    assert isinstance(failed, ModelFailure) and isinstance(answered, EncodeResult)
    await reached(engine, "ready")
    assert not left_behind(engine)


@pytest.mark.parametrize("step", [*PROBED, OWN_STEPS[1]])
async def test_an_engine_in_which_a_step_keeps_failing_has_failed(
    model: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A probe finds that out, then a restart does not help. Whoever waits or comes gets an error at once."""
    async with started(model, tmp_path) as engine:
        Fault(monkeypatch, step, raising(MemoryError), lasts=True)
        waiting = await outcomes_of(*(ask(engine) for _ in range(3)))
        async with asyncio.timeout(30):
            while engine.state != "failed":
                [outcome] = await outcomes_of(ask(engine))
                assert isinstance(outcome, EncodeResult | EncoderError)
                await asyncio.sleep(0.01)
        [refused] = await outcomes_of(ask(engine))
        reason = await engine.failed()

    assert all(isinstance(outcome, EncodeResult | EncoderError) for outcome in waiting)
    assert isinstance(refused, NotReady)
    assert reason


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets steps that hang go on, at the end of the test at the latest."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("step", MODEL_STEPS)
async def test_a_step_that_hangs_on_the_model_thread_keeps_nobody_waiting(
    model: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, release: threading.Event
) -> None:
    """A thread in a call that never returns cannot be ended, so the engine fails, and the process can be replaced."""
    monkeypatch.setattr(guardian, "TICK_S", 0.01)
    monkeypatch.setattr(guardian, "END_S", 0.01)
    monkeypatch.setattr(batch_loop, "LOCK_S", 0.01)
    async with started(model, tmp_path, stall_s=0.4) as engine:
        first = ask(engine)  # so that the thread comes to the step
        Fault(monkeypatch, step, lambda: release.wait(60), lasts=True)
        await asyncio.wait([first], timeout=0.01)
        outcomes = await outcomes_of(first, *(ask(engine) for _ in range(3)))
        await asyncio.wait_for(engine.failed(), 30)
        [refused] = await outcomes_of(ask(engine))

    # Some may be answered before the thread comes to the step.
    assert all(isinstance(outcome, EncodeResult | NotReady) for outcome in outcomes)
    assert isinstance(refused, NotReady)


async def test_a_result_that_is_not_finite_fails_its_own_prompt_and_is_looked_into(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the model or the prompt was to blame, a probe tells."""
    prompts = [next(PROMPT) for _ in range(3)]
    forward, states = engine._guardian.generation.encoder.forward, []

    def forward_with_nan(jobs: Sequence[Job], taps: Sequence[Any]) -> Any:
        hidden_states = {tap: list(rows) for tap, rows in forward(jobs, taps).items()}
        if len(jobs) > 1:
            for rows in hidden_states.values():
                rows[1] = mx.full(rows[1].shape, float("nan"))
        return hidden_states

    monkeypatch.setattr(engine._guardian.generation.encoder, "forward", forward_with_nan)
    monkeypatch.setattr(engine._guardian.state, "_on_change", lambda: states.append(engine.state))
    # One batch: the first waits until the others have come.
    requests = [asyncio.create_task(engine.encode([prompt], SHORT, cache_policy="bypass")) for prompt in prompts]
    first, second, third = await outcomes_of(*requests)
    await asyncio.sleep(0)

    assert isinstance(first, EncodeResult) and isinstance(third, EncodeResult)
    assert isinstance(second, ModelFailure)
    assert states[:1] == ["suspect"]


async def test_a_batch_that_cannot_be_formed_fails_the_oldest_prompt_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest prompt leads every batch, so without it the next attempt may succeed."""
    Fault(monkeypatch, f"{SERVING}.batcher.Batcher.take_batch", raising(MemoryError))
    oldest, *others = [
        asyncio.create_task(engine.encode([next(PROMPT)], SHORT, cache_policy="bypass")) for _ in range(3)
    ]
    await outcomes_of(oldest, *others)

    assert isinstance(oldest.exception(), ModelFailure)
    assert [other.exception() for other in others] == [None, None]
    await reached(engine, "ready")
    assert not left_behind(engine)


async def test_a_failure_that_cannot_be_logged_is_still_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory, logging fails as well."""
    log = Fault(monkeypatch, f"{SERVING}.health.logger.error", raising(MemoryError), lasts=True)
    Fault(monkeypatch, "encoder.text_encoder.TextEncoder.dispatch", raising(MemoryError))
    [outcome] = await outcomes_of(asyncio.create_task(engine.encode([next(PROMPT)], SHORT)))

    assert isinstance(outcome, ModelFailure) and log.acted
    assert len((await asyncio.wait_for(engine.encode([next(PROMPT)], SHORT), 30)).embeds) == 1
    await reached(engine, "ready")
    assert not left_behind(engine)


async def test_a_failed_pass_frees_its_memory_before_its_prompts_run_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual reason is that memory ran out, and the traceback holds the arrays of the pass."""
    dispatch = TextEncoder.dispatch
    held: list[weakref.ref[Any]] = []

    class Computed:
        """Stands for the arrays of a pass."""

    def dispatch_if_alone(encoder: TextEncoder, begun: BegunBatch) -> DispatchedBatch:
        if len(begun.jobs) > 1:
            computed = Computed()
            held.append(weakref.ref(computed))
            raise MemoryError("out of memory")
        assert held[0]() is None
        return dispatch(encoder, begun)

    monkeypatch.setattr(TextEncoder, "dispatch", dispatch_if_alone)
    monkeypatch.setattr(f"{SERVING}.health.logger.error", lambda *args, **kwargs: None)  # pytest keeps what is logged
    result = await engine.encode([next(PROMPT), next(PROMPT)], SHORT)

    assert len(held) == 1 and len(result.embeds) == 2


async def test_closing_while_a_prompt_is_tokenized_fails_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a disk cache, whose threads have ended when the prompt is looked up."""
    engine = Engine(ModelOptions("demo", cache_dir=tmp_path), disk_cache_dir=tmp_path / "results")
    await engine.start()
    reached, release = asyncio.Event(), threading.Event()
    loop, tokenize = asyncio.get_running_loop(), TextEncoder.tokenize

    def tokenize_late(encoder: TextEncoder, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        loop.call_soon_threadsafe(reached.set)
        release.wait(30)
        return tokenize(encoder, prompts, preset)

    monkeypatch.setattr(TextEncoder, "tokenize", tokenize_late)
    late = asyncio.create_task(engine.encode(["a cat " * 100], SHORT))
    await reached.wait()
    await engine.close()
    release.set()

    [outcome] = await outcomes_of(late)
    assert isinstance(outcome, NotReady)
    assert not left_behind(engine)
