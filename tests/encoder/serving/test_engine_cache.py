"""The engine with a cache on disk: real model, real folder, and restarts."""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from encoder.errors import DeadlineExceeded, NotReady, QueueFull
from encoder.options import ComputeDType, ModelOptions
from encoder.pipeline.limits import Limits
from encoder.presets.built_in import LAST_HIDDEN_STATE, get_preset
from encoder.serving.cache.folder import ResultFolder
from encoder.serving.engine import Engine
from encoder.types import PromptEmbeds

pytestmark = pytest.mark.anyio

# A few layers and a short window, to be quick.
KLEIN = replace(get_preset("flux2-klein"), layers=(0, 2, 4), max_sequence_length=64)
SHORT = replace(LAST_HIDDEN_STATE, max_sequence_length=64)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@asynccontextmanager
async def opened(
    folder: Path | None, model: ModelOptions, compute_dtype: ComputeDType = "auto", **options: Any
) -> AsyncIterator[Engine]:
    """An engine from start to close."""
    engine = Engine(replace(model, compute_dtype=compute_dtype), disk_cache_dir=folder, **options)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


class HeldReads:
    """Holds every read from the disk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        read = ResultFolder.read

        def read_when_opened(folder: ResultFolder, key: str) -> PromptEmbeds | None:
            self.reached.set()
            self.opened.wait(30)
            return read(folder, key)

        monkeypatch.setattr(ResultFolder, "read", read_when_opened)

    async def are_reached(self) -> None:
        async with asyncio.timeout(30):
            while not self.reached.is_set():
                await asyncio.sleep(0.001)


async def test_a_restarted_engine_finds_earlier_results(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model) as engine:
        first = await engine.encode(["a cat", "a dog"], KLEIN)
    async with opened(folder, model) as engine:
        again = await engine.encode(["a dog", "a cat"], KLEIN)
        third = await engine.encode(["a cat"], KLEIN)
        stats = engine.stats()

    assert (first.cache, again.cache, third.cache) == ("miss", "hit", "hit")
    assert (again.layers_run, again.inference_ms, stats.batches) == (0, 0, 0)
    assert (stats.disk_cache_hits, stats.cache_hits, stats.cache_misses) == (2, 1, 0)
    assert third.embeds[0] is again.embeds[1]  # what the disk has answered is in memory from then on
    for mine, theirs in zip(again.embeds, reversed(first.embeds), strict=True):
        np.testing.assert_array_equal(mine.hidden_states, theirs.hidden_states)
        np.testing.assert_array_equal(mine.attention_mask, theirs.attention_mask)
        assert (mine.dtype, mine.rows_axis) == (theirs.dtype, theirs.rows_axis)


async def test_only_prompts_that_are_not_on_disk_run(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
    async with opened(folder, model) as engine:
        result = await engine.encode(["a cat", "a dog"], KLEIN)

        assert result.cache == "miss"
        assert (engine.stats().disk_cache_hits, engine.stats().prompts) == (1, 1)


async def test_two_engines_share_a_folder(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model) as one, opened(folder, model) as other:
        await one.encode(["a cat"], KLEIN)
        async with asyncio.timeout(30):
            while not files(folder):
                await asyncio.sleep(0.01)

        assert (await other.encode(["a cat"], KLEIN)).cache == "hit"


async def test_another_preset_dtype_or_compute_dtype_is_not_the_stored_result(
    folder: Path, model: ModelOptions
) -> None:
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
    async with opened(folder, model) as engine:
        for preset, dtype in (
            (SHORT, "bfloat16"),
            (replace(KLEIN, layers=(0, 2, 3)), "bfloat16"),
            (KLEIN, "float32"),
        ):
            assert (await engine.encode(["a cat"], preset, dtype)).cache == "miss"  # type: ignore[arg-type]
    async with opened(folder, model, compute_dtype="bfloat16") as engine:
        assert (await engine.encode(["a cat"], KLEIN)).cache == "miss"


async def test_without_memory_the_disk_answers(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model, cache_bytes=0) as engine:
        caches = [(await engine.encode(["a cat"], KLEIN)).cache for _ in range(3)]

        assert caches == ["miss", "hit", "hit"]
        assert engine.stats().cache_entries == 0
        assert engine.stats().disk_cache_hits == 2


async def test_a_result_too_large_for_memory_is_on_disk(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model, cache_bytes=4000) as engine:
        caches = [(await engine.encode(["a cat"], KLEIN)).cache for _ in range(2)]

        assert caches == ["miss", "hit"]
        assert engine.stats().cache_entries == 0


async def test_equal_prompts_share_a_look_up_and_run_once(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        requests = [asyncio.create_task(engine.encode(["a cat"], KLEIN)) for _ in range(3)]
        await reads.are_reached()
        await asyncio.sleep(0.05)
        reads.opened.set()
        results = await asyncio.gather(*requests)

        assert sorted(result.cache for result in results) == ["coalesced", "coalesced", "miss"]
        assert engine.stats().prompts == 1


async def test_a_request_that_joins_a_successful_look_up_is_a_hit(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        requests = [asyncio.create_task(engine.encode(["a cat"], KLEIN)) for _ in range(2)]
        await reads.are_reached()
        reads.opened.set()
        results = await asyncio.gather(*requests)

        assert [result.cache for result in results] == ["hit", "hit"]
        assert engine.stats().prompts == 0


async def test_a_look_up_survives_the_cancellation_of_the_first_request(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        first = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await reads.are_reached()
        second = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await asyncio.sleep(0.05)
        first.cancel()
        reads.opened.set()

        assert (await second).cache == "coalesced"


async def test_a_prompt_that_no_request_wants_after_the_look_up_does_not_run(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        with pytest.raises(DeadlineExceeded):
            await engine.encode(["a cat"], KLEIN, timeout_s=0.05)
        reads.opened.set()
        await engine.encode(["a dog"], KLEIN)
        async with asyncio.timeout(30):  # the look-ups may end in any order
            while len(engine._guardian.generation.in_flight):
                await asyncio.sleep(0.001)

        assert engine.stats().prompts == 1


async def test_a_full_queue_refuses_after_the_look_up(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = Limits(max_queue_tokens=64)
    async with opened(folder, model, limits=limits) as engine:
        reads = HeldReads(monkeypatch)
        requests = [asyncio.create_task(engine.encode([letter * 64], SHORT)) for letter in "ab"]
        await reads.are_reached()
        hold = threading.Event()
        loop = engine._guardian.generation.batch_loop
        take = loop._take
        monkeypatch.setattr(loop, "_take", lambda: take() if hold.wait(30) else None)
        third = asyncio.create_task(engine.encode(["c" * 64], SHORT))
        await asyncio.sleep(0.05)
        reads.opened.set()
        await asyncio.wait([*requests, third], timeout=0.5)
        hold.set()
        outcomes = await asyncio.gather(*requests, third, return_exceptions=True)

        assert any(isinstance(outcome, QueueFull) for outcome in outcomes)
        assert len(engine._guardian.generation.in_flight) == 0


async def test_a_disk_that_hangs_is_not_waited_for(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("encoder.serving.cache.disk.LOOKUP_S", 0.05)
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        results = [await engine.encode([prompt], KLEIN) for prompt in ("a cat", "a dog", "a fox")]
        errors = engine.stats().disk_cache_errors
        reads.opened.set()

    assert [result.cache for result in results] == ["miss"] * 3
    assert errors == 1  # once it is known to hang, it is not asked
    assert "no answer within" in caplog.text


async def test_closing_fails_requests_that_are_looked_up(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        request = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await reads.are_reached()
        [lookup] = engine._guardian.generation.results._lookups
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0.05)
        reads.opened.set()
        await closing

    assert lookup.cancelled()  # it would find the folder's threads gone

    with pytest.raises(NotReady, match="closed"):
        await request


class HeldWrites:
    """Holds every write to the disk until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write = ResultFolder.write

        def write_when_opened(folder: ResultFolder, key: str, result: PromptEmbeds) -> None:
            self.opened.wait(30)
            write(folder, key, result)

        monkeypatch.setattr(ResultFolder, "write", write_when_opened)


async def test_closing_writes_pending_results(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = HeldWrites(monkeypatch)
    async with opened(folder, model) as engine:
        await engine.encode(["a cat", "a dog"], KLEIN)
        before = files(folder)
        writes.opened.set()

    assert (len(before), len(files(folder))) == (0, 2)


async def test_a_result_that_waits_to_be_written_is_found(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An equal prompt does not run again even where the memory tier keeps nothing."""
    writes = HeldWrites(monkeypatch)
    async with opened(folder, model, cache_bytes=0) as engine:
        first = await engine.encode(["a cat"], KLEIN)
        again = await engine.encode(["a cat"], KLEIN)
        writes.opened.set()

    assert again.cache == "hit"
    assert again.embeds[0] is first.embeds[0]


async def test_results_are_dropped_when_too_many_bytes_wait_to_be_written(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk must not fill the memory."""
    monkeypatch.setattr("encoder.serving.cache.disk.MAX_PENDING_BYTES", 15_000)  # one result of 64 rows has 12,288
    writes = HeldWrites(monkeypatch)
    async with opened(folder, model) as engine:
        await engine.encode(["a cat", "a dog", "a fox"], KLEIN)
        dropped = engine.stats().disk_cache_dropped
        writes.opened.set()

    assert dropped == 2


@pytest.mark.parametrize("trouble", [None, OSError("no space left on device")], ids=["written", "failed"])
async def test_a_finished_or_failed_write_makes_room_for_the_next(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch, trouble: OSError | None
) -> None:
    """Else failed writes would fill the bound, and nothing would be written any more."""
    monkeypatch.setattr("encoder.serving.cache.disk.MAX_PENDING_BYTES", 30_000)  # two results of 12,288
    async with opened(folder, model) as engine:
        if trouble is not None:
            monkeypatch.setattr("encoder.serving.cache.folder._dump", Mock(side_effect=trouble))
        await engine.encode(["a cat", "a dog"], KLEIN)
        async with asyncio.timeout(30):
            while engine._cache._disk._pending:  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
        writes = HeldWrites(monkeypatch)
        await engine.encode(["a fox", "a hen"], KLEIN)
        dropped = engine.stats().disk_cache_dropped
        writes.opened.set()

    assert dropped == 0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: os.truncate(file, file.stat().st_size // 2), id="cut off"),
        pytest.param(lambda file: file.write_bytes(b"not ours"), id="foreign"),
    ],
)
async def test_a_damaged_file_is_computed_again_and_replaced(
    folder: Path, model: ModelOptions, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(folder, model) as engine:
        first = await engine.encode(["a cat"], KLEIN)
    [file] = files(folder)
    damage(file)
    async with opened(folder, model) as engine:
        again = await engine.encode(["a cat"], KLEIN)
        errors = engine.stats().disk_cache_errors
    async with opened(folder, model) as engine:
        third = await engine.encode(["a cat"], KLEIN)

    assert (again.cache, third.cache, errors) == ("miss", "hit", 1)
    assert "was damaged and is deleted" in caplog.text
    np.testing.assert_array_equal(third.embeds[0].hidden_states, first.embeds[0].hidden_states)


@pytest.mark.parametrize("policy", ["refresh", "bypass"])
async def test_refresh_and_bypass_read_nothing(folder: Path, model: ModelOptions, policy: Any) -> None:
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
        in_memory = await engine.encode(["a cat"], KLEIN, cache_policy=policy)
    async with opened(folder, model) as engine:
        on_disk = await engine.encode(["a cat"], KLEIN, cache_policy=policy)

    assert (in_memory.cache, on_disk.cache) == ("miss", "miss")


async def test_bypass_keeps_nothing(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN, cache_policy="bypass")
        again = await engine.encode(["a cat"], KLEIN, cache_policy="bypass")
        entries = engine.stats().cache_entries

    assert (again.cache, entries, files(folder)) == ("miss", 0, [])


async def test_refresh_replaces_the_cached_result(folder: Path, model: ModelOptions) -> None:
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
        fresh = await engine.encode(["a cat"], KLEIN, cache_policy="refresh")
        after = await engine.encode(["a cat"], KLEIN)

        assert after.embeds[0] is fresh.embeds[0]
        assert engine.stats().cache_entries == 1
    assert len(files(folder)) == 1


async def test_a_hit_in_memory_marks_the_file_as_used(folder: Path, model: ModelOptions) -> None:
    """Else the folder would evict the results that are asked for most."""
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
        async with asyncio.timeout(30):
            while not files(folder):
                await asyncio.sleep(0.01)
        [file] = files(folder)
        os.utime(file, (0, 0))
        assert (await engine.encode(["a cat"], KLEIN)).cache == "hit"

    assert file.stat().st_mtime > 0


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def replace_by_a_file(folder: Path) -> None:
    remove(folder)
    folder.write_bytes(b"")


async def test_a_deleted_folder_is_made_anew(
    folder: Path, model: ModelOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "encoder.serving.cache")
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
        await engine._cache._disk._writer.run(bool)  # type: ignore[union-attr]
        remove(folder)
        caches = [(await engine.encode([prompt], KLEIN)).cache for prompt in ("a dog", "a cat")]

    assert caches == ["miss", "hit"]
    assert len(files(folder)) == 1
    assert not [record for record in caplog.records if str(folder) in record.getMessage()]


async def test_a_folder_replaced_by_a_file_leaves_memory_and_one_warning(
    folder: Path, model: ModelOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "encoder.serving.cache")
    async with opened(folder, model) as engine:
        await engine.encode(["a cat"], KLEIN)
        await engine._cache._disk._writer.run(bool)  # type: ignore[union-attr]
        remove(folder)
        folder.write_bytes(b"")
        for prompt in ("a dog", "a fox", "a hen"):
            assert (await engine.encode([prompt], KLEIN)).cache == "miss"
        assert [(await engine.encode([prompt], KLEIN)).cache for prompt in ("a cat", "a hen")] == ["hit", "hit"]
        await engine._cache._disk._writer.run(bool)  # type: ignore[union-attr]

        assert engine.stats().disk_cache_errors >= 3
    assert len([record for record in caplog.records if str(folder) in record.getMessage()]) == 1


async def test_a_write_that_hangs_is_left_behind_at_the_end(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("encoder.serving.cache.disk.CLOSE_S", 0.01)
    writes = HeldWrites(monkeypatch)
    async with opened(folder, model) as engine:
        await engine.encode(["a cat", "a dog"], KLEIN)
    writes.opened.set()

    assert "2 results are lost" in caplog.text


async def test_look_ups_that_wait_are_bounded(
    folder: Path, model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk must not gather requests that the queue would refuse: what is not looked up is computed."""
    monkeypatch.setattr("encoder.serving.cache.disk.MAX_READS", 2)
    async with opened(folder, model) as engine:
        reads = HeldReads(monkeypatch)
        held = asyncio.create_task(engine.encode(["a cat", "a dog"], KLEIN))
        await reads.are_reached()
        beside = await engine.encode(["a fox"], KLEIN)
        reads.opened.set()
        await held

    assert beside.cache == "miss"


@pytest.mark.parametrize("parent", ["/proc", "/dev/null"])
async def test_a_folder_that_cannot_be_made_leaves_memory_and_one_warning(
    model: ModelOptions, parent: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(parent) / "results"
    async with opened(folder, model) as engine:
        caches = [(await engine.encode([prompt], KLEIN)).cache for prompt in ("a cat", "a dog", "a cat")]

    assert caches == ["miss", "miss", "hit"]
    assert len([record for record in caplog.records if str(folder) in record.getMessage()]) == 1


async def test_without_a_folder_nothing_is_written(model: ModelOptions, tmp_path: Path) -> None:
    async with opened(None, replace(model, cache_dir=tmp_path)) as engine:
        await engine.encode(["a cat"], KLEIN)
        stats = engine.stats()

    assert list(tmp_path.iterdir()) == []
    assert (stats.disk_cache_bytes, stats.disk_cache_entries, stats.cache_entries) == (0, 0, 1)
