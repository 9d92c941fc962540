"""Tokenizing as a stage of its own, in a real engine: bounded, fair between requests, and safe from calls that hang."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

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
from encoder.presets.built_in import LAST_HIDDEN_STATE
from encoder.presets.preset import Preset
from encoder.serving import tokenizing
from encoder.serving.engine import Engine
from encoder.serving.pieces import PIECE_CHARS, Piece
from encoder.serving.tokenizer_thread import TokenizerThread
from encoder.serving.tokenizing import THREADS
from encoder.text_encoder import TextEncoder
from encoder.types import EncodeResult, TokenizedPrompt

pytestmark = pytest.mark.anyio

PRESET = replace(LAST_HIDDEN_STATE, max_sequence_length=16)
LONG = "x" * PIECE_CHARS  # a piece of its own
LIMITS = Limits(max_tokenizing_chars=40 * PIECE_CHARS)
Make = Callable[[Engine], Awaitable[object]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def running(model: ModelOptions, **arguments: Any) -> AsyncIterator[Engine]:
    engine = Engine(model, **{"limits": LIMITS, **arguments})
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture
async def engine(model: ModelOptions) -> AsyncIterator[Engine]:
    async with running(model) as engine:
        yield engine


class Gate:
    """Calls of the tokenizer for prompts that begin with `word` wait until the gate opens.

    Attributes:
        calls: the first prompt of each call, in the order in which they began.
        turns: the first prompt of each piece, in the order in which threads got them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, word: str = "x") -> None:
        self.calls: list[str] = []
        self._open = threading.Event()
        tokenize = TextEncoder.tokenize

        def tokenize_when_open(encoder: TextEncoder, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
            self.calls.append(prompts[0])
            if prompts[0].startswith(word):
                assert self._open.wait(60)
            return tokenize(encoder, prompts, preset)

        monkeypatch.setattr(TextEncoder, "tokenize", tokenize_when_open)
        self.turns: list[str] = []
        begin = TokenizerThread.begin

        def note_and_begin(thread: TokenizerThread, piece: Piece) -> None:
            self.turns.append(piece.prompts[0])
            begin(thread, piece)

        monkeypatch.setattr(TokenizerThread, "begin", note_and_begin)

    def open(self) -> None:
        self._open.set()

    async def reached(self, calls: int) -> None:
        async with asyncio.timeout(60):
            while len(self.calls) < calls:
                await asyncio.sleep(0.001)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> "AsyncIterator[Gate]":
    gate = Gate(monkeypatch)
    yield gate  # type: ignore[misc]
    gate.open()


def start(engine: Engine, *prompts: str, timeout_s: float = 300) -> "asyncio.Task[Any]":
    return asyncio.create_task(engine.encode(prompts, PRESET, timeout_s=timeout_s))


async def until_idle(engine: Engine) -> None:
    async with asyncio.timeout(60):
        while engine.stats().tokenizing_chars:
            await asyncio.sleep(0.001)


async def test_prompts_of_all_lengths_come_back_in_their_order(engine: Engine, model: ModelOptions) -> None:
    """A request is cut into pieces, and several threads tokenize them."""
    prompts = [f"{number} " * (number * number) for number in range(40)]

    tokenized = await engine.tokenize(prompts, PRESET)

    assert tokenized == TextEncoder.open(model).tokenize(prompts, PRESET)


async def test_a_small_request_waits_for_no_large_one(engine: Engine, gate: Gate) -> None:
    large = start(engine, *[LONG] * 30)
    await gate.reached(THREADS)
    small = start(engine, "small " * 100)
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(large, small)

    assert gate.turns[THREADS] == "small " * 100


async def test_large_requests_take_turns(engine: Engine, gate: Gate) -> None:
    first = start(engine, *["xa" + LONG] * 12)
    await gate.reached(THREADS)
    second = start(engine, *["xb" + LONG] * 12)
    await asyncio.sleep(0)
    gate.open()
    await asyncio.gather(first, second)

    half = [prompt[:2] for prompt in gate.turns[:12]]
    assert 4 <= half.count("xb") <= 8


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda engine: engine.encode([LONG] * 30, PRESET, timeout_s=0.05), id="encode"),
        pytest.param(lambda engine: engine.tokenize([LONG] * 30, PRESET, timeout_s=0.05), id="tokenize"),
    ],
)
async def test_past_its_deadline_a_request_ends_and_its_rest_is_not_begun(
    engine: Engine, gate: Gate, make: Make
) -> None:
    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s; the time ran out while the prompts were tokenized"):
        await asyncio.wait_for(make(engine), 60)
    gate.open()
    await engine.tokenize(["small " * 100], PRESET)

    assert len(gate.calls) == THREADS + 1
    await until_idle(engine)
    assert engine.stats().tokenizing_requests == 0


async def test_a_cancelled_request_gives_its_place_back(engine: Engine, gate: Gate) -> None:
    request = start(engine, *[LONG] * 30)
    await gate.reached(THREADS)
    request.cancel()
    await asyncio.wait([request])

    assert engine.stats().tokenizing_chars == THREADS * PIECE_CHARS  # which cannot be interrupted
    gate.open()
    await engine.tokenize(["small " * 100], PRESET)
    assert len(gate.calls) == THREADS + 1


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda engine: engine.encode([LONG] * 20, PRESET), id="encode"),
        pytest.param(lambda engine: engine.tokenize([LONG] * 20, PRESET), id="tokenize"),
    ],
)
async def test_more_characters_than_may_wait_are_refused_and_those_before_are_answered(
    engine: Engine, gate: Gate, make: Make
) -> None:
    accepted = start(engine, *[LONG] * 30)
    await gate.reached(THREADS)

    with pytest.raises(QueueFull, match=r"240000 of 320000 characters .* adds 160000\. Retry in 1 s") as caught:
        await make(engine)

    assert caught.value.retry_after_s == 1  # 80,000 characters must be tokenized before there is room
    await engine.tokenize(["short"], PRESET)  # takes no room
    gate.open()
    await accepted
    await make(engine)


async def test_a_request_beyond_the_whole_stage_is_too_large(engine: Engine) -> None:
    """429 would tell the client to retry for ever."""
    with pytest.raises(
        RequestTooLarge, match="has 328000 characters, all that are tokenized at a time may have 320000"
    ):
        await engine.tokenize([LONG] * 41, PRESET)


@pytest.mark.parametrize("prompt", ["raises", "raises " * 100])
async def test_a_tokenizer_that_raises_fails_that_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    """On the event loop and on a thread, and with a panic of the library, which is no Exception."""
    tokenize = TextEncoder.tokenize

    class Panic(BaseException):
        pass

    def panic(encoder: TextEncoder, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        if prompts[0].startswith("raises"):
            raise Panic("out of bounds")
        return tokenize(encoder, prompts, preset)

    monkeypatch.setattr(TextEncoder, "tokenize", panic)
    for _ in range(THREADS + 1):  # every thread survives it
        failed, answered = await asyncio.gather(
            start(engine, prompt), start(engine, "fine " * 100), return_exceptions=True
        )
        assert isinstance(failed, ModelFailure) and "out of bounds" in str(failed)
        assert len(answered.embeds) == 1  # type: ignore[union-attr]


async def test_a_prompt_that_cannot_be_read_fails_its_request_with_the_reason(engine: Engine) -> None:
    with pytest.raises(InvalidField, match="surrogate"):
        await engine.tokenize(["fine " * 2000, "\ud800" * 500], PRESET)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("encoder.serving.tokenizing.cut", id="cut"),
        pytest.param("encoder.serving.fair_queue.FairQueue.put", id="queue"),
        pytest.param("encoder.serving.fair_queue.FairQueue.take", id="take-a-turn"),
        pytest.param("encoder.serving.tokenizer_thread.TokenizerThread.begin", id="give-to-a-thread"),
        pytest.param("encoder.serving.tokenizer_thread.TokenizerThread._tokenize", id="thread-ends"),
        pytest.param("encoder.serving.pieces.Request.accept", id="accept"),
        pytest.param("encoder.serving.rate.Rate.measure", id="measure"),
    ],
)
async def test_an_unexpected_error_at_any_step_leaves_nobody_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A piece or a thread may be lost by it: then the model is loaded anew, and who waits gets 503."""
    original, faults = resolve_name(step), iter([MemoryError("no memory")])

    def faulty(*arguments: Any) -> Any:
        for error in faults:
            raise error
        return original(*arguments)

    monkeypatch.setattr(step, faulty)
    requests = [start(engine, f"{number} " * 500) for number in range(4)]
    outcomes = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 60)
    async with asyncio.timeout(60):
        while engine.state != "ready":
            await asyncio.sleep(0.01)

    assert all(isinstance(outcome, EncodeResult | EncoderError) for outcome in outcomes)
    assert next(faults, None) is None
    await asyncio.gather(*(start(engine, f"{number} again " * 500) for number in range(2 * THREADS)))


async def test_a_call_that_hangs_costs_its_request_and_no_other(engine: Engine, gate: Gate) -> None:
    hanging = start(engine, LONG, timeout_s=0.5)
    await gate.reached(1)

    for number in range(10):
        await asyncio.wait_for(engine.encode([f"{number} " * 500], PRESET), 60)

    with pytest.raises(DeadlineExceeded, match="tokenized"):
        await hanging


async def test_where_every_thread_hangs_requests_are_refused_at_once(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 503: no waiting will help. What waits already gets it too, and short prompts need no thread."""
    monkeypatch.setattr(tokenizing, "STUCK_TICKS", 2)
    hanging = [start(engine, LONG) for _ in range(THREADS)]
    waiting = start(engine, "waits " * 100)

    for request in (waiting, *hanging):
        with pytest.raises(NotReady, match="No thread of the tokenizer answers"):
            await asyncio.wait_for(request, 60)
    with pytest.raises(NotReady, match="No thread of the tokenizer answers"):
        await engine.encode(["comes " * 100], PRESET)
    await engine.encode(["short"], PRESET)

    gate.open()
    await until_idle(engine)
    await engine.encode(["comes " * 100], PRESET)


async def test_a_call_that_does_not_return_for_stall_s_fails_the_engine(model: ModelOptions, gate: Gate) -> None:
    """No thread can be ended, so the process is to be."""
    async with running(model, stall_s=0.5) as engine:
        hanging = start(engine, LONG)
        reason = await asyncio.wait_for(engine.failed(), 60)

        assert "A call of the tokenizer has not returned for more than 0.5 s" in reason
        with pytest.raises(NotReady, match="A call of the tokenizer"):
            await hanging
        gate.open()


async def test_a_closed_engine_leaves_no_thread_behind(model: ModelOptions) -> None:
    before = set(threading.enumerate())
    async with running(model) as engine:
        await engine.tokenize([LONG] * 4, PRESET)
        threads = {thread for thread in threading.enumerate() if thread.name == "tokenizer"} - before
        assert len(threads) == THREADS
    async with asyncio.timeout(60):
        while threads & set(threading.enumerate()):
            await asyncio.sleep(0.001)
