"""An unexpected exception at each step of a request fails its own batch only, and no request hangs."""

import asyncio
import pkgutil
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import ModelFailure, NotReady
from encoder.options import ModelOptions
from encoder.presets.built_in import LAST_HIDDEN_STATE
from encoder.presets.preset import Preset
from encoder.serving.engine import Engine
from encoder.text_encoder import BegunBatch, DispatchedBatch, TextEncoder
from encoder.types import EncodeResult, TokenizedPrompt

pytestmark = pytest.mark.anyio

SHORT = replace(LAST_HIDDEN_STATE, max_sequence_length=64)
PROMPT = (f"prompt {number}" for number in count())  # a new one each time, so none is in the cache

SERVING = "encoder.serving"
# Where an exception can come from once a request has entries, and others may have joined them.
STEPS = [
    pytest.param(f"{SERVING}.in_flight.InFlight.add", id="register-the-entries"),
    pytest.param(f"{SERVING}.cache.ResultCache.find_on_disk", id="look-up"),
    pytest.param(f"{SERVING}.cache.disk.DiskCache._read", id="read-the-disk"),
    pytest.param(f"{SERVING}.batcher.Batcher.put", id="queue"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._wake", id="wake-the-thread"),
    pytest.param(f"{SERVING}.batcher.Batcher.take_batch", id="take-a-batch"),
    pytest.param("encoder.text_encoder.TextEncoder.begin", id="begin"),
    pytest.param("encoder.text_encoder.TextEncoder.dispatch", id="dispatch"),
    pytest.param("encoder.text_encoder.select", id="select"),
    pytest.param("encoder.text_encoder.TextEncoder.collect", id="collect"),
    pytest.param("encoder.text_encoder.export", id="export"),
    pytest.param(f"{SERVING}.batch._detach_if_large", id="copy-on-the-thread"),
    pytest.param("encoder.types.PromptEmbeds.detach", id="copy-on-the-loop"),
    pytest.param(f"{SERVING}.in_flight.InFlight.deliver", id="deliver"),
    pytest.param(f"{SERVING}.cache.ResultCache.put", id="cache"),
    pytest.param(f"{SERVING}.cache.memory.MemoryCache.put", id="cache-in-memory"),
    pytest.param(f"{SERVING}.cache.disk.DiskCache.write", id="cache-on-disk"),
    pytest.param(f"{SERVING}.in_flight.InFlight.settle", id="settle"),
    pytest.param(f"{SERVING}.in_flight._resolve", id="resolve-the-waiters"),
    pytest.param(f"{SERVING}.batch_loop.BatchLoop._count", id="count"),
]
# Where the request has no entries yet, so that no other request is concerned.
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


class Unexpected(BaseException):
    """Not even an Exception."""


ERRORS = [pytest.param(MemoryError, id="MemoryError"), pytest.param(Unexpected, id="BaseException")]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """With a disk cache, so that every step exists."""
    folder: Path = tmp_path_factory.mktemp("engine")
    engine = Engine(ModelOptions("demo", cache_dir=folder), disk_cache_dir=folder / "results")
    await engine.start()
    yield engine
    await engine.close()


class Fault:
    """Makes a step raise: once, or, while `lasts` is true, each time."""

    def __init__(
        self, patch: pytest.MonkeyPatch, step: str, error: type[BaseException], *, lasts: bool = False
    ) -> None:
        path, _, name = step.rpartition(".")
        owner = pkgutil.resolve_name(path)
        original = getattr(owner, name)
        self.lasts, self.raised = lasts, 0

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.lasts or not self.raised:
                self.raised += 1
                raise error("an unexpected error")
            return original(*args, **kwargs)

        patch.setattr(owner, name, faulty)


def left_behind(engine: Engine) -> dict[str, object]:
    """What must be empty when no request is being served."""
    stats, loop = engine.stats(), engine._guardian.generation.batch_loop
    return {
        "unsettled": len(engine._guardian.generation.in_flight),
        "joinable": len(engine._guardian.generation.in_flight._joinable),
        "queued": stats.queued_prompts,
        "queued tokens": stats.queued_tokens,
        "running": stats.running_prompts,
        "finished": len(loop._finished),
        "requests": engine._requests,
    }


NOTHING = dict.fromkeys(("unsettled", "joinable", "queued", "queued tokens", "running", "finished", "requests"), 0)


async def reached(engine: Engine, *states: str) -> None:
    """Return when the engine is in one of these states."""
    async with asyncio.timeout(30):
        while engine.state not in states:
            await asyncio.sleep(0.001)


async def outcomes_of(*requests: "asyncio.Task[EncodeResult]") -> list[Any]:
    """The result or the error of each request, soon: none may wait for its own deadline."""
    done, pending = await asyncio.wait(requests, timeout=30)
    assert not pending, "a request hangs"
    return [request.exception() or request.result() for request in done]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", STEPS)
async def test_an_exception_at_any_step_fails_its_own_batch_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    """All requests for the prompt fail at once, the next request succeeds, and nothing is left behind."""
    prompt = next(PROMPT)
    fault = Fault(monkeypatch, step, error)
    requests = [asyncio.create_task(engine.encode([prompt], SHORT)) for _ in range(3)]
    outcomes = await outcomes_of(*requests)

    assert fault.raised == 1
    assert all(isinstance(outcome, EncodeResult | ModelFailure | error) for outcome in outcomes)
    queue = engine._guardian.generation.batch_loop._batcher
    assert all(entry.is_probe for entry in queue)  # others would run although no request waits for them
    assert len((await asyncio.wait_for(engine.encode([prompt, next(PROMPT)], SHORT), 30)).embeds) == 2
    await reached(engine, "ready")
    assert left_behind(engine) == NOTHING


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", OWN_STEPS)
async def test_an_exception_before_a_request_has_entries_fails_that_request_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    prompt = next(PROMPT)
    fault = Fault(monkeypatch, step, error)
    first = asyncio.create_task(engine.encode([prompt], SHORT))
    second = asyncio.create_task(engine.encode([prompt], SHORT))

    [failed, answered] = sorted(await outcomes_of(first, second), key=lambda outcome: isinstance(outcome, EncodeResult))
    assert fault.raised == 1
    assert isinstance(failed, error | ModelFailure) and isinstance(answered, EncodeResult)
    assert left_behind(engine) == NOTHING


async def test_a_batch_that_cannot_be_formed_fails_the_oldest_prompt_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest prompt leads every batch, so without it the next attempt may succeed."""
    Fault(monkeypatch, f"{SERVING}.batcher.Batcher.take_batch", MemoryError)
    oldest, *others = [
        asyncio.create_task(engine.encode([next(PROMPT)], SHORT, cache_policy="bypass")) for _ in range(3)
    ]
    await outcomes_of(oldest, *others)

    assert isinstance(oldest.exception(), ModelFailure)
    assert [other.exception() for other in others] == [None, None]
    await reached(engine, "ready")
    assert left_behind(engine) == NOTHING


async def test_a_failure_that_cannot_be_logged_is_still_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory, logging fails as well."""
    log = Fault(monkeypatch, f"{SERVING}.health.logger.error", MemoryError, lasts=True)
    Fault(monkeypatch, "encoder.text_encoder.TextEncoder.dispatch", MemoryError)
    [outcome] = await outcomes_of(asyncio.create_task(engine.encode([next(PROMPT)], SHORT)))

    assert isinstance(outcome, ModelFailure) and log.raised
    assert len((await asyncio.wait_for(engine.encode([next(PROMPT)], SHORT), 30)).embeds) == 1
    await reached(engine, "ready")
    assert left_behind(engine) == NOTHING


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
    assert left_behind(engine) == NOTHING
