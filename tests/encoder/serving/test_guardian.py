"""A model that breaks is replaced, and nobody waits for it."""

import asyncio
import contextlib
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from encoder.errors import ModelFailure, NotReady
from encoder.options import ModelOptions
from encoder.presets.built_in import LAST_HIDDEN_STATE
from encoder.serving import guardian
from encoder.serving.engine import Engine
from encoder.text_encoder import BegunBatch, TextEncoder
from encoder.types import EncodeResult, Job

pytestmark = pytest.mark.anyio

SHORT = replace(LAST_HIDDEN_STATE, max_sequence_length=64)
PROMPT = (f"prompt {number}" for number in count())  # a new one each time, so none is in the cache


class DeviceLost(BaseException):
    """Not even an Exception."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@contextlib.asynccontextmanager
async def started(model: ModelOptions, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(model, **options)
    await engine.start()
    try:
        yield engine
    finally:
        with contextlib.suppress(TimeoutError):  # its thread hangs
            await engine.close()


async def reached(engine: Engine, state: str) -> None:
    async with asyncio.timeout(30):
        while engine.state != state:
            await asyncio.sleep(0.001)


async def outcomes(requests: Sequence["asyncio.Task[EncodeResult]"]) -> list[Any]:
    """The result or the error of each request, soon: none may wait for its own deadline."""
    done, pending = await asyncio.wait(requests, timeout=30)
    assert not pending, "a request hangs"
    return [request.exception() or request.result() for request in done]


def break_the_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch, *, times: int = 1) -> None:
    """What hands over the next batch raises, and so ends the model thread."""
    remaining = iter(range(times))
    loop = type(engine._guardian.generation.batch_loop)
    hand_over = loop._hand_over

    def hand_over_or_raise(self: Any, batch: Any) -> None:
        if next(remaining, None) is not None:
            raise DeviceLost("device lost")
        hand_over(self, batch)

    monkeypatch.setattr(loop, "_hand_over", hand_over_or_raise)


async def test_a_model_thread_that_ends_is_replaced(model: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that wait get 503 at once, with the time that a load takes, and the next request is served."""
    async with started(model) as engine:
        old = weakref.ref(engine._guardian.generation.encoder)
        monkeypatch.setattr(
            "encoder.serving.model_thread.logger.error", print
        )  # pytest keeps tracebacks that are logged
        break_the_thread(engine, monkeypatch)
        failed = await outcomes([asyncio.create_task(engine.encode([next(PROMPT)], SHORT)) for _ in range(3)])
        failed = [type(error) for error in failed]  # their tracebacks hold the model as well
        assert engine.state == "restarting"
        with pytest.raises(NotReady, match="device lost") as refused:
            engine.check_ready()
        await reached(engine, "ready")
        result = await engine.encode([next(PROMPT)], SHORT)
        stats = engine.stats()

    assert failed == [NotReady] * 3
    assert refused.value.retry_after_s >= 1
    assert len(result.embeds) == 1 and stats.restarts == 1 and stats.batches == 1
    assert old() is None  # its memory went before the model was loaded again


async def test_a_model_that_breaks_again_at_once_has_failed(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(model) as engine:
        break_the_thread(engine, monkeypatch, times=9)
        await outcomes([asyncio.create_task(engine.encode([next(PROMPT)], SHORT))])
        reason = await asyncio.wait_for(engine.failed(), 30)
        [refused] = await outcomes([asyncio.create_task(engine.encode([next(PROMPT)], SHORT))])

    assert "device lost" in reason
    assert isinstance(refused, NotReady) and engine.state == "failed"


async def test_a_step_that_hangs_fails_the_engine(model: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread in a call that never returns cannot be ended, so the process must be replaced."""
    monkeypatch.setattr(guardian, "TICK_S", 0.01)
    release = threading.Event()
    async with started(model, stall_s=0.1) as engine:
        monkeypatch.setattr(engine._guardian.generation.encoder, "collect", lambda dispatched: release.wait(60))
        requests = [asyncio.create_task(engine.encode([next(PROMPT)], SHORT)) for _ in range(3)]
        failed = await outcomes(requests)
        reason = await asyncio.wait_for(engine.failed(), 30)
        release.set()

    assert [type(error) for error in failed] == [NotReady] * 3
    assert "collect" in reason and "0.1 s" in reason


async def test_after_a_failure_a_probe_finds_out_whether_the_model_works(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, broken = TextEncoder.begin, True

    def begin_unless_broken(encoder: TextEncoder, jobs: Sequence[Job]) -> BegunBatch:
        nonlocal broken
        if broken:
            broken = False
            raise RuntimeError("out of memory")
        return begin(encoder, jobs)

    async with started(model) as engine:
        monkeypatch.setattr(TextEncoder, "begin", begin_unless_broken)
        with pytest.raises(ModelFailure, match="out of memory"):
            await engine.encode([next(PROMPT)], SHORT)
        assert engine.state == "suspect"
        with pytest.raises(NotReady, match="out of memory"):
            engine.check_ready()
        await reached(engine, "ready")

        assert engine.stats().restarts == engine.stats().probes_failed == 0
