"""The engine on a small checkpoint, with its real thread, queue and cache."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from encoder.errors import (
    DeadlineExceeded,
    EncoderError,
    InvalidField,
    ModelFailure,
    NotReady,
    QueueFull,
    RequestTooLarge,
)
from encoder.options import ModelOptions
from encoder.pipeline.limits import Limits
from encoder.pipeline.selection import select
from encoder.presets.built_in import LAST_HIDDEN_STATE, get_preset
from encoder.presets.preset import Preset
from encoder.qwen3.cpu.forward import CpuForward
from encoder.qwen3.cuda.to_host import HostCopy
from encoder.qwen3.forward import Forward
from encoder.serving.engine import Engine
from encoder.text_encoder import BegunBatch, CollectedBatch, DispatchedBatch, TextEncoder
from encoder.types import CachePolicy, EncodeResult, Job, PromptEmbeds, Rows, Tap, TokenizedPrompt

pytestmark = pytest.mark.anyio

# A few layers and a short window, to be quick.
KLEIN = replace(get_preset("flux2-klein"), layers=(0, 2, 4), max_sequence_length=64)
Z_IMAGE = replace(get_preset("ollama/z-image"), max_sequence_length=64)
SHORT = replace(LAST_HIDDEN_STATE, max_sequence_length=64)
SMALL = Limits(
    max_prompts=4, max_prompt_chars=100, max_sequence_length=64, max_queue_tokens=64, max_output_bytes=10_000
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engine(model: ModelOptions) -> AsyncIterator[Engine]:
    engine = Engine(model)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def small_engine(model: ModelOptions) -> AsyncIterator[Engine]:
    engine = Engine(model, limits=SMALL)
    await engine.start()
    yield engine
    await engine.close()


class Gate:
    """Holds the model thread until the gate opens, so that a test can fill the queue meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open = threading.Event()

    async def __aenter__(self) -> "Gate":
        encoder = self._engine._guardian.generation.encoder
        begin = encoder.begin

        def begin_when_open(jobs: Sequence[Job]) -> BegunBatch:
            self._open.wait(30)
            return begin(jobs)

        encoder.begin = begin_when_open  # type: ignore[method-assign]
        self.first = asyncio.create_task(self._engine.encode(["x"], SHORT))
        while not self._engine.stats().running_prompts:
            assert not self.first.done()
            await asyncio.sleep(0.001)
        return self

    def open(self) -> None:
        self._open.set()

    async def __aexit__(self, *error: object) -> None:
        self.open()
        await self.first


async def queued(engine: Engine, prompts: int) -> None:
    async with asyncio.timeout(30):
        while engine.stats().queued_prompts != prompts:
            await asyncio.sleep(0.001)


async def test_a_result_equals_that_of_the_synchronous_encoder(engine: Engine, model: ModelOptions) -> None:
    result = await engine.encode(["a cat"], KLEIN, dtype="float32")

    [expected] = TextEncoder.open(model).encode(["a cat"], KLEIN, "float32")
    np.testing.assert_array_equal(result.embeds[0].hidden_states, expected.hidden_states)
    assert result.prompts[0].text == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert result.layers_run == 5


async def test_a_prompt_asked_for_again_comes_from_the_cache(engine: Engine) -> None:
    first = await engine.encode(["a cat"], KLEIN)
    again = await engine.encode(["a cat"], KLEIN)

    assert (first.cache, again.cache) == ("miss", "hit")
    assert again.embeds[0] is first.embeds[0]
    assert engine.stats().batches == 1


async def test_the_cache_does_not_keep_the_memory_of_a_whole_batch(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the small results of a batch share memory. Those that the cache keeps are copied out of it."""
    monkeypatch.setattr("encoder.text_encoder.select", partial(select, grouped=True))
    passing = await engine.encode(["a", "b"], SHORT, cache_policy="bypass")
    kept = await engine.encode(["a", "b"], SHORT)
    found = await engine.encode(["b", "a"], SHORT)

    assert [embeds.shares_memory for embeds in passing.embeds] == [True, True]
    assert [embeds.shares_memory for embeds in [*kept.embeds, *found.embeds]] == [False] * 4
    assert found.cache == "hit"
    np.testing.assert_array_equal(found.embeds[1].hidden_states, passing.embeds[0].hidden_states)


@pytest.mark.parametrize(("large_bytes", "thread"), [(1, "model"), (2**20, "MainThread")])
async def test_a_large_result_that_the_cache_keeps_is_copied_on_the_model_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, large_bytes: int, thread: str
) -> None:
    """A GPU writes results into memory that is used again. A large copy would hold up the event loop; small ones are
    copied there, because each would make the model thread wait for the GIL.
    """
    monkeypatch.setattr("encoder.pipeline.selection.copy_to_host", lambda x: HostCopy(x, np.array(x)))
    monkeypatch.setattr("encoder.types.LARGE_BYTES", large_bytes)
    detach, copied_on = PromptEmbeds.detach, []

    def record_thread(embeds: PromptEmbeds) -> PromptEmbeds:
        copied_on.extend([threading.current_thread().name] if embeds.shares_memory else [])
        return detach(embeds)

    monkeypatch.setattr(PromptEmbeds, "detach", record_thread)
    passing = await engine.encode(["a"], SHORT, cache_policy="bypass")
    assert (passing.embeds[0].shares_memory, copied_on) == (True, [])

    kept = await engine.encode(["a"], SHORT)
    assert (kept.embeds[0].shares_memory, copied_on) == (False, [thread])
    np.testing.assert_array_equal(kept.embeds[0].hidden_states, passing.embeds[0].hidden_states)


async def test_another_dtype_or_layer_is_not_the_cached_result(engine: Engine) -> None:
    await engine.encode(["a cat"], KLEIN)

    assert (await engine.encode(["a cat"], KLEIN, dtype="float32")).cache == "miss"
    assert (await engine.encode(["a cat"], replace(KLEIN, layers=(0, 2, 3)))).cache == "miss"


async def test_a_refresh_does_not_read_the_cache(engine: Engine) -> None:
    await engine.encode(["a cat"], KLEIN)

    assert (await engine.encode(["a cat"], KLEIN, cache_policy="refresh")).cache == "miss"


async def test_equal_prompts_of_one_request_run_once(engine: Engine) -> None:
    result = await engine.encode(["a cat", "a dog", "a cat"], KLEIN)

    assert engine.stats().prompts == 2
    assert result.embeds[0] is result.embeds[2]


async def test_equal_prompts_in_flight_run_once(engine: Engine) -> None:
    async with Gate(engine) as gate:
        requests = [asyncio.create_task(engine.encode(["a cat"], KLEIN)) for _ in range(3)]
        await queued(engine, 1)
        await asyncio.sleep(0.05)
        gate.open()
        results = await asyncio.gather(*requests)

    assert sorted(result.cache for result in results) == ["coalesced", "coalesced", "miss"]
    assert engine.stats().prompts == 2


async def test_prompts_that_wait_together_share_a_batch(engine: Engine) -> None:
    """Also those of different presets."""
    async with Gate(engine) as gate:
        requests = [
            asyncio.create_task(engine.encode(["a cat"], SHORT)),
            asyncio.create_task(engine.encode(["a dog"], Z_IMAGE)),
        ]
        await queued(engine, 2)
        gate.open()
        await asyncio.gather(*requests)

    assert engine.stats().batches == 2


class LatePass:
    """A forward pass that runs as a whole when it is finished, so that a CPU can play a device that begins early."""

    def __init__(self, forward: Forward, jobs: Sequence[Job], taps: Sequence[Tap]) -> None:
        self._forward, self._jobs, self._taps = forward, jobs, taps

    def finish(self) -> Mapping[Tap, Rows]:
        return self._forward(self._jobs, self._taps)


@dataclass
class Traced:
    """Records what the model thread does, and holds it after it has begun a batch until `go_on` is set.

    Attributes:
        overlaps: whether the device plays a GPU, which computes one batch while the host collects another.
        steps: "begin", "dispatch" or "collect" and the number of prompts in the batch, in order.
    """

    engine: Engine
    overlaps: bool
    steps: list[tuple[str, int]] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        encoder = self.engine._guardian.generation.encoder
        begin, dispatch, collect = encoder.begin, encoder.dispatch, encoder.collect
        if self.overlaps:
            encoder.forward.begin = partial(LatePass, encoder.forward)  # type: ignore[attr-defined]

        def begin_traced(jobs: Sequence[Job]) -> BegunBatch:
            self.steps.append(("begin", len(jobs)))
            begun = begin(jobs)
            self.go_on.wait(30)
            return begun

        def dispatch_traced(begun: BegunBatch) -> DispatchedBatch:
            self.steps.append(("dispatch", len(begun.jobs)))
            return dispatch(begun)

        def collect_traced(dispatched: DispatchedBatch) -> CollectedBatch:
            self.steps.append(("collect", len(dispatched.selection.jobs)))
            return collect(dispatched)

        encoder.begin = begin_traced  # type: ignore[method-assign]
        encoder.dispatch = dispatch_traced  # type: ignore[method-assign]
        encoder.collect = collect_traced  # type: ignore[method-assign]

    async def encode_one_then_three(self) -> list[EncodeResult]:
        """Encode one prompt, and three more that arrive while it runs."""
        first = asyncio.create_task(self.engine.encode(["a"], SHORT))
        async with asyncio.timeout(30):
            while not self.steps:
                await asyncio.sleep(0.001)
        others = asyncio.create_task(self.engine.encode(["b", "c", "d"], SHORT))
        await queued(self.engine, 3)
        self.go_on.set()
        return list(await asyncio.wait_for(asyncio.gather(first, others), 30))


OVERLAPPING = [
    *[("begin", 1), ("dispatch", 1)],
    *[("begin", 3), ("collect", 1), ("dispatch", 3), ("collect", 3)],
]
IN_TURN = [(step, prompts) for prompts in (1, 3) for step in ("begin", "dispatch", "collect")]


async def test_a_batch_begins_before_the_previous_one_is_collected(engine: Engine) -> None:
    """So the device never waits for the host. The last batch is collected without waiting for another."""
    traced = Traced(engine, overlaps=True)
    alone, together = await traced.encode_one_then_three()

    assert traced.steps == OVERLAPPING
    assert [len(result.embeds) for result in (alone, together)] == [1, 3]
    assert engine.stats().running_prompts == 0


async def test_a_batch_takes_at_most_half_of_the_prompts_that_wait_and_run(engine: Engine) -> None:
    """Two prompts of one request run and two others wait. Half of four is two, so these share a batch."""
    traced = Traced(engine, overlaps=True)
    running = asyncio.create_task(engine.encode(["a" * 20, "b" * 20], SHORT))
    async with asyncio.timeout(30):
        while not traced.steps:
            await asyncio.sleep(0.001)
    waiting = [asyncio.create_task(engine.encode([letter * 20], SHORT)) for letter in "cd"]
    await queued(engine, 2)
    traced.go_on.set()
    await asyncio.gather(running, *waiting)

    assert [prompts for step, prompts in traced.steps if step == "begin"] == [2, 2]


async def test_without_overlap_batches_run_one_after_the_other(engine: Engine) -> None:
    """The later a batch is formed, the more prompts can share it."""
    traced = Traced(engine, overlaps=False)
    await traced.encode_one_then_three()

    assert traced.steps == IN_TURN


async def test_measured_passes_do_not_overlap(engine: Engine) -> None:
    """The time of one would be counted as time of the other."""
    engine._guardian.generation.encoder.measures_passes = True
    traced = Traced(engine, overlaps=True)
    await traced.encode_one_then_three()

    assert traced.steps == IN_TURN


@pytest.mark.parametrize("failing", [1, 3], ids=["the-first", "the-second"])
async def test_a_batch_that_fails_does_not_fail_the_batch_it_overlaps(engine: Engine, failing: int) -> None:
    """One has begun when the other fails."""
    traced = Traced(engine, overlaps=True)
    collect = engine._guardian.generation.encoder.collect

    def collect_unless_failing(dispatched: DispatchedBatch) -> CollectedBatch:
        collected = collect(dispatched)
        if len(dispatched.selection.jobs) == failing:
            raise RuntimeError("device lost")
        return collected

    engine._guardian.generation.encoder.collect = collect_unless_failing  # type: ignore[method-assign]
    if failing == 1:
        with pytest.raises(ModelFailure, match="device lost"):
            await traced.encode_one_then_three()
        traced.go_on.set()
        assert len((await engine.encode(["b", "c", "d"], SHORT)).embeds) == 3
    else:
        assert [len(result.embeds) for result in await traced.encode_one_then_three()] == [1, 3]


async def test_the_time_in_which_batches_overlap_is_counted_once(engine: Engine) -> None:
    """Both in the times that a request gets and in the rate from which `Retry-After` follows."""
    traced = Traced(engine, overlaps=True)
    started = time.perf_counter()
    alone, together = await traced.encode_one_then_three()

    assert alone.inference_ms + together.inference_ms <= (time.perf_counter() - started) * 1e3
    assert together.queue_ms > 0


async def test_closing_finishes_the_running_batch_before_the_model_thread_ends(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else MLX's streams would be cleared while the device still uses them."""
    engine = Engine(model)
    await engine.start()
    traced = Traced(engine, overlaps=True)
    clear_streams = mx.clear_streams

    def clear_traced() -> None:
        traced.steps.append(("clear streams", 0))
        clear_streams()

    monkeypatch.setattr(mx, "clear_streams", clear_traced)
    request = asyncio.create_task(engine.encode(["a"], SHORT))
    async with asyncio.timeout(30):
        while not traced.steps:
            await asyncio.sleep(0.001)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.05)
    traced.go_on.set()
    await closing

    assert traced.steps == [("begin", 1), ("dispatch", 1), ("collect", 1), ("clear streams", 0)]
    with pytest.raises(NotReady, match="closed"):
        await request


async def test_a_cancelled_request_frees_its_place(small_engine: Engine) -> None:
    async with Gate(small_engine):
        waiting = asyncio.create_task(small_engine.encode(["a" * 64], SHORT))
        await queued(small_engine, 1)
        with pytest.raises(QueueFull, match="holds 64 of 64 tokens"):
            await small_engine.encode(["b" * 64], SHORT)

        waiting.cancel()
        await queued(small_engine, 0)

        assert small_engine.stats().queued_tokens == 0


async def test_a_prompt_is_settled_once_for_all_requests_that_still_wait(engine: Engine) -> None:
    """One request has been cancelled just before, and a second outcome comes after the first."""
    async with Gate(engine):
        cancelled, waiting = (asyncio.create_task(engine.encode(["a cat"], KLEIN)) for _ in range(2))
        await queued(engine, 1)
        in_flight = engine._guardian.generation.in_flight
        [entry] = [entry for entry in in_flight._unsettled if entry.waiters and entry.job.depth == 5]
        cancelled.cancel()
        in_flight.settle(entry, NotReady("The first answer.", 1))
        in_flight.settle(entry, NotReady("The second answer.", 1))

        with pytest.raises(NotReady, match="first"):
            await waiting
        with pytest.raises(asyncio.CancelledError):
            await cancelled


async def test_a_coalesced_prompt_survives_the_cancellation_of_the_first_request(engine: Engine) -> None:
    async with Gate(engine) as gate:
        first = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await queued(engine, 1)
        second = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await asyncio.sleep(0.05)
        first.cancel()
        gate.open()

        assert (await second).cache == "coalesced"


async def test_cancelling_a_refresh_leaves_the_entry_that_others_may_join(engine: Engine) -> None:
    async with Gate(engine) as gate:
        first = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await queued(engine, 1)
        refresh = asyncio.create_task(engine.encode(["a cat"], KLEIN, cache_policy="refresh"))
        await queued(engine, 2)
        refresh.cancel()
        await queued(engine, 1)
        joining = asyncio.create_task(engine.encode(["a cat"], KLEIN))
        await asyncio.sleep(0.05)
        gate.open()

        assert [(await first).cache, (await joining).cache] == ["miss", "coalesced"]


async def test_a_prompt_that_a_large_request_has_queued_is_as_soon_done_as_any_other(model: ModelOptions) -> None:
    """A single prompt that joins it must not wait for all that is before it there."""
    engine = Engine(model, limits=Limits(max_batch_tokens=20))
    await engine.start()
    prompts = [f"{number:02}" + "x" * 18 for number in range(20)]
    async with Gate(engine) as gate:
        large = asyncio.create_task(engine.encode(prompts, SHORT))
        await queued(engine, 20)
        single = asyncio.create_task(engine.encode([prompts[-1]], SHORT))
        await asyncio.sleep(0)
        gate.open()
        await single
        batches = engine.stats().batches
        await large
    await engine.close()

    assert single.result().cache == "coalesced"
    assert batches < 10


async def test_an_answered_request_leaves_no_timer_behind(engine: Engine) -> None:
    """Its deadline may be minutes away, and a service answers thousands until then."""
    timers: Any = asyncio.get_running_loop()
    await engine.encode(["a cat"], KLEIN)
    before = sum(not timer.cancelled() for timer in timers._scheduled)
    await asyncio.gather(*(engine.encode([f"a dog {number}"], SHORT) for number in range(10)))

    assert sum(not timer.cancelled() for timer in timers._scheduled) == before


@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "a dog", "a horse"]])
async def test_a_request_past_its_deadline_fails_and_frees_its_place(engine: Engine, prompts: list[str]) -> None:
    async with Gate(engine), asyncio.timeout(30):
        with pytest.raises(DeadlineExceeded, match=r"No result within 0\.05 s"):
            await engine.encode(prompts, KLEIN, timeout_s=0.05)

        assert engine.stats().queued_prompts == 0


@pytest.mark.parametrize("policy", ["use", "refresh", "bypass"])
async def test_closing_fails_requests_that_still_wait(model: ModelOptions, policy: CachePolicy) -> None:
    """Whether or not other requests may join their prompts."""
    engine = Engine(model)
    await engine.start()
    gate = await Gate(engine).__aenter__()
    waiting = asyncio.create_task(engine.encode(["a cat"], KLEIN, cache_policy=policy))
    await queued(engine, 1)

    closing = asyncio.create_task(engine.close())
    for request in (waiting, gate.first):
        with pytest.raises(NotReady, match="closed"):
            await asyncio.wait_for(request, 30)

    gate.open()
    await closing


async def test_a_request_that_is_tokenized_while_the_engine_closes_fails_at_once(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was accepted, and no batch will run any more."""
    engine = Engine(model)
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

    with pytest.raises(NotReady, match="closed"):
        await asyncio.wait_for(late, 30)
    assert engine.stats().queued_prompts == 0


async def test_the_first_refused_request_is_told_a_time_that_follows_from_the_warm_up(engine: Engine) -> None:
    """A rate of 500 tokens per second, assumed until a batch had been measured, told it to wait for a minute."""
    preset = replace(LAST_HIDDEN_STATE, max_sequence_length=1024)
    async with Gate(engine):
        waiting = [
            asyncio.create_task(engine.encode([f"{number} " * 600 for number in range(start, start + 32)], preset))
            for start in (10, 42)
        ]
        await queued(engine, 64)
        with pytest.raises(QueueFull) as caught:
            await engine.encode(["x " * 600], preset)
        for request in waiting:
            request.cancel()
        await asyncio.wait(waiting)

    assert caught.value.retry_after_s <= 8  # an eighth of the queue is 8192 tokens: 17 s at that rate


async def test_a_refused_request_leaves_nothing_behind(small_engine: Engine) -> None:
    """Neither for a request that is too large nor for a full queue."""
    async with Gate(small_engine) as gate:
        with pytest.raises(RequestTooLarge):
            await small_engine.encode(["a" * 60, "b" * 60], SHORT)
        waiting = asyncio.create_task(small_engine.encode(["a" * 60], SHORT))
        await queued(small_engine, 1)
        with pytest.raises(QueueFull):
            await small_engine.encode(["b" * 60], SHORT)
        gate.open()
        await waiting
    await gate.first

    assert (
        not small_engine._guardian.generation.in_flight._unsettled
        and not small_engine._guardian.generation.in_flight._joinable
    )


async def test_a_batch_that_raises_runs_its_prompts_one_by_one(engine: Engine) -> None:
    """An out-of-memory error of a large batch must not fail prompts that fit alone."""
    encoder = engine._guardian.generation.encoder
    begin = encoder.begin

    def begin_if_alone(jobs: Sequence[Job]) -> BegunBatch:
        if len(jobs) > 1:
            raise RuntimeError("out of memory")
        return begin(jobs)

    encoder.begin = begin_if_alone  # type: ignore[method-assign]

    result = await engine.encode(["a cat", "a dog"], KLEIN)

    assert all(isinstance(embeds, PromptEmbeds) for embeds in result.embeds)


@pytest.mark.parametrize(
    ("prompts", "prefix", "on_the_loop"),
    [
        pytest.param(["a cat"], "", True, id="short"),
        pytest.param(["a cat " * 100], "", False, id="long"),
        pytest.param(["a cat, a dog"] * 50, "", False, id="many"),
        pytest.param(["a cat"], "Describe it. " * 50, False, id="long-template"),
    ],
)
async def test_only_little_text_is_tokenized_on_the_event_loop(
    engine: Engine, prompts: list[str], prefix: str, on_the_loop: bool
) -> None:
    """It takes half a millisecond, which is about as long as the detour over another thread."""
    encoder = engine._guardian.generation.encoder
    tokenize, threads = encoder.tokenize, []

    def record_thread(prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        threads.append(threading.current_thread())
        return tokenize(prompts, preset)

    encoder.tokenize = record_thread  # type: ignore[method-assign]
    await engine.tokenize(prompts, replace(SHORT, prefix=prefix))

    assert [thread is threading.current_thread() for thread in threads] == [on_the_loop]


@pytest.mark.parametrize(
    ("largest", "starts"), [pytest.param(600, True, id="batch"), pytest.param(500, False, id="window")]
)
async def test_the_engine_starts_if_passes_of_the_common_window_run(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, largest: int, starts: bool
) -> None:
    """A GPU may have room for the model and one prompt, but not for a large batch."""
    run, sizes = TextEncoder.run, []

    def run_if_it_fits(encoder: TextEncoder, jobs: Sequence[Job]) -> list[PromptEmbeds | EncoderError]:
        sizes.append(sum(job.computed_rows for job in jobs))
        if sizes[-1] > largest:
            raise RuntimeError("out of memory")
        return run(encoder, jobs)

    monkeypatch.setattr(TextEncoder, "run", run_if_it_fits)
    monkeypatch.setattr(CpuForward, "warmup_sizes", lambda self, max_rows: (512, 544, max_rows - 1, max_rows))
    engine = Engine(model, limits=Limits(max_batch_tokens=1000))
    try:
        if starts:
            await engine.start()
            assert sizes == [512, 512, 544, 999]
            assert "A batch of 999 tokens does not run: out of memory" in caplog.text
        else:
            with pytest.raises(RuntimeError, match="out of memory"):
                await engine.start()
    finally:
        await engine.close()


async def test_nothing_is_served_before_the_model_is_loaded(model: ModelOptions) -> None:
    engine = Engine(model)

    with pytest.raises(NotReady, match="still loading"):
        await engine.encode(["a cat"], KLEIN)
    await engine.close()


@pytest.mark.parametrize(
    ("prompts", "fields", "error", "message"),
    [
        pytest.param([], {}, InvalidField, "prompts: none given", id="no prompts"),
        pytest.param(["x"] * 5, {}, RequestTooLarge, "prompts: 5 in one request, allowed are 4", id="prompts"),
        pytest.param(["x" * 101], {}, RequestTooLarge, "101 characters .*, allowed are 100", id="characters"),
        pytest.param(["x"], {"max_sequence_length": 65}, InvalidField, "65; allowed are 1 to 64", id="window"),
        pytest.param(["x"], {"max_sequence_length": 0}, InvalidField, "0; allowed are 1 to 64", id="no window"),
        pytest.param(["x" * 60], {"layers": (0, 1), "hidden_states": None}, RequestTooLarge, "bytes", id="output"),
        pytest.param(["x"], {"layers": (6,), "hidden_states": None}, InvalidField, "layers: 6", id="layer"),
    ],
)
async def test_limits_are_checked_before_anything_runs(
    small_engine: Engine, prompts: list[str], fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await small_engine.encode(prompts, replace(SHORT, **fields), dtype="float32")  # type: ignore[arg-type]

    assert small_engine.stats().batches == 0
