"""A model that breaks is replaced, and nobody waits for it."""

import asyncio
import contextlib
import gc
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from encoder.errors import ModelFailure, NotReady
from encoder.options import ModelOptions
from encoder.presets.built_in import LAST_HIDDEN_STATE
from encoder.serving import guardian
from encoder.serving.engine import Engine
from encoder.text_encoder import BegunBatch, CollectedBatch, DispatchedBatch, TextEncoder
from encoder.types import EncodeResult, Job
from tests.checkpoints import write_checkpoint

pytestmark = pytest.mark.anyio

SHORT = replace(LAST_HIDDEN_STATE, max_sequence_length=64)
PROMPT = (f"prompt {number}" for number in count())  # a new one each time, so none is in the cache


class DeviceLost(BaseException):
    """Not even an Exception."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """As for what a service has frozen once it was ready."""
    gc.disable()
    yield
    gc.enable()


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


@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_model_thread_that_ends_is_replaced(model: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that wait get 503 at once, with the time that a load takes, and the next request is served."""
    async with started(model) as engine:
        encoder = engine._guardian.generation.encoder
        old = [weakref.ref(part) for part in (encoder, encoder.model, encoder.forward)]
        del encoder
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
    assert [part() for part in old] == [None] * 3  # its memory went before the model was loaded again


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
    async with started(model, stall_s=0.5) as engine:
        monkeypatch.setattr(engine._guardian.generation.encoder, "collect", lambda dispatched: release.wait(60))
        requests = [asyncio.create_task(engine.encode([next(PROMPT)], SHORT)) for _ in range(3)]
        failed = await outcomes(requests)
        reason = await asyncio.wait_for(engine.failed(), 30)
        release.set()

    assert [type(error) for error in failed] == [NotReady] * 3
    assert "collect" in reason and "0.5 s" in reason


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


async def test_requests_that_come_while_the_model_loads_are_refused_and_leave_nothing_behind(
    model: ModelOptions, tmp_path: Path
) -> None:
    """With a disk cache, which is opened after the model is loaded: no request may use it before."""
    engine = Engine(model, disk_cache_dir=tmp_path)
    starting, refused = asyncio.create_task(engine.start()), []
    while not starting.done():
        refused += await outcomes([asyncio.create_task(engine.encode([next(PROMPT)], SHORT))])
    try:
        result = await asyncio.wait_for(engine.encode([next(PROMPT)], SHORT), 30)
    finally:
        await engine.close()

    assert isinstance(refused[0], NotReady)
    assert {type(outcome) for outcome in refused} <= {NotReady, EncodeResult}  # the last may find it ready
    assert result.cache == "miss"


async def test_what_a_replaced_model_still_delivers_reaches_nobody(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither requests of the new model nor the cache."""
    async with started(model) as engine:
        old = engine._guardian.generation
        collected, finished = threading.Event(), []
        collect = old.encoder.collect

        def collect_late(dispatched: DispatchedBatch) -> CollectedBatch:
            collected.wait(30)
            return collect(dispatched)

        monkeypatch.setattr(old.encoder, "collect", collect_late)
        monkeypatch.setattr(old.in_flight, "deliver", lambda *args: finished.append(args) or deliver(*args))
        deliver = type(old.in_flight).deliver.__get__(old.in_flight)
        prompt = next(PROMPT)
        waiting = asyncio.create_task(engine.encode([prompt], SHORT))
        async with asyncio.timeout(30):
            while not engine.stats().running_prompts:
                await asyncio.sleep(0.001)
        engine._guardian._condemn("The device is lost.")
        [failed] = await outcomes([waiting])
        collected.set()
        await reached(engine, "ready")
        again = await engine.encode([prompt], SHORT)

    assert isinstance(failed, NotReady) and finished
    assert again.cache == "miss"


async def test_a_restart_reads_the_model_s_files_again(
    model: ModelOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of the old files are not served for the new ones, from memory or from the disk."""
    folder = tmp_path / "model"
    shutil.copytree(model.model, folder)
    async with started(ModelOptions(str(folder)), disk_cache_dir=tmp_path / "results") as engine:
        first = await engine.encode(["a cat"], SHORT)
        fingerprint = engine.info.fingerprint
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 32}
        write_checkpoint(folder, num_hidden_layers=4, num_key_value_heads=1, dtype="bfloat16", **shape)
        engine._guardian._condemn("The device is lost.")
        await reached(engine, "ready")
        second = await engine.encode(["a cat"], SHORT)

        assert engine.info.fingerprint != fingerprint
    assert (first.layers_run, second.layers_run) == (6, 4)


async def test_each_of_several_waiters_gets_an_error_of_its_own(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception collects the frames of all who raise it."""
    async with started(model) as engine:
        monkeypatch.setattr(engine._guardian.generation.encoder, "begin", lambda jobs: 1 / 0)
        prompt = next(PROMPT)
        errors = await outcomes([asyncio.create_task(engine.encode([prompt], SHORT)) for _ in range(3)])

    assert [type(error) for error in errors] == [ModelFailure] * 3
    assert len({id(error) for error in errors}) == 3
    assert len({str(error) for error in errors}) == 1


async def test_the_death_of_the_guardian_is_heard(model: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would notice a broken model any more."""
    async with started(model) as engine:
        monkeypatch.setattr(engine._guardian, "_look", lambda: 1 / 0)

        assert "ZeroDivisionError" in await asyncio.wait_for(engine.failed(), 30)
        [refused] = await outcomes([asyncio.create_task(engine.encode([next(PROMPT)], SHORT))])
        assert isinstance(refused, NotReady)


async def test_results_that_nobody_was_told_of_are_found(model: ModelOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback of the event loop may be lost, as where it raises."""
    async with started(model) as engine:
        monkeypatch.setattr(engine._guardian.generation.batch_loop, "_call_on_loop", lambda function: None)
        [result] = await outcomes([asyncio.create_task(engine.encode([next(PROMPT)], SHORT))])

    assert isinstance(result, EncodeResult)


async def test_a_pass_may_take_long_where_passes_take_long(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch on a slow CPU takes minutes and does not hang: it is judged by the batches before."""
    monkeypatch.setattr(guardian, "TICK_S", 0.01)
    async with started(model, stall_s=0.3) as engine:
        generation = engine._guardian.generation
        generation.batch_loop._slow_s_per_row = 100.0
        collect = generation.encoder.collect

        def collect_slowly(dispatched: DispatchedBatch) -> CollectedBatch:
            time.sleep(0.8)  # longer than the limit
            return collect(dispatched)

        monkeypatch.setattr(generation.encoder, "collect", collect_slowly)
        result = await engine.encode(["abc"], SHORT)

        assert len(result.embeds) == 1 and engine.state == "ready"
