"""Single steps of a request, measured with pyperf.

    make bench-micro
    python -m benchmarks.micro [-o before.json], and pyperf's other options
    python -m pyperf compare_to before.json after.json

The model is the demo checkpoint. Results have the sizes that Qwen3-4B gives: 512 rows of 3 × 2560 numbers for FLUX.2
klein, 52 rows of 2560 numbers for Z-Image. `benchmarks.overhead` measures what server, sockets and clients add.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

from encoder.options import ModelOptions

from encoder import Engine, Preset, PromptEmbeds, TextEncoder, get_preset  # isort: skip  # before MLX: see blas.py
import mlx.core as mx
import numpy as np
import pyperf
from fastapi import FastAPI

from app import wire
from app.http.budget import Budget, Hold
from app.main import create_app
from app.reply.reply import collate
from app.service import service_of
from app.settings import Settings
from encoder.pipeline.selection import export, select
from encoder.serving.batcher import Batcher, Entry
from encoder.serving.cache.folder import ResultFolder
from encoder.serving.cache.key import model_identity, result_key
from encoder.serving.cache.memory import MemoryCache
from encoder.types import Job, Tap

KLEIN, ZIMAGE = get_preset("flux2-klein"), get_preset("z-image")
PROMPT = "a cat on a mat in the evening light of a long summer, oil on canvas"
WIDTH = 2560
AT_ONCE = 64
BUDGET = Budget(sys.maxsize, make_room=lambda _: None)
FOLDER = tempfile.TemporaryDirectory()

Step = Callable[[], object]
AsyncStep = Callable[[], Awaitable[None]]


def embeds(rows: int, layers: int) -> PromptEmbeds:
    """A result of this size."""
    numbers = np.random.default_rng(0).integers(0, 60_000, (rows, layers * WIDTH), dtype=np.uint16)
    return PromptEmbeds(numbers, np.arange(rows) < 30, "bfloat16")


def job_for(encoder: TextEncoder, preset: Preset) -> Job:
    """The job of PROMPT."""
    [job] = encoder.plan(encoder.tokenize([PROMPT], preset), preset, "bfloat16")
    return job


@cache  # pyperf calls a step several times in a process
def demo() -> TextEncoder:
    """The demo checkpoint."""
    return TextEncoder.open(ModelOptions("demo"))


def queue() -> Step:
    """Put AT_ONCE prompts into the batcher, and take batches until it is empty."""
    job = Job((1,) * 40, 40, 40, dropped_rows=0, taps=(Tap(35, normed=False),), combine="concat", dtype="bfloat16")

    def step() -> None:
        batcher = Batcher(max_queue_tokens=65_536, max_batch_tokens=4096, count_tokens=sum, overhead_rows=400)
        for _ in range(AT_ONCE):
            batcher.put([Entry(job)], retry_after_s=1)
        while batcher.take_batch():
            pass

    return step


def tokenize() -> Step:
    """One prompt, with its template."""
    return lambda: demo().tokenize([PROMPT], ZIMAGE)


def take(rows: int, layers: int) -> Step:
    """Convert hidden states in float32 to a result in bfloat16, on a CPU."""
    mx.set_default_device(mx.cpu)
    states = {Tap(depth, normed=False): mx.random.normal((1, rows, WIDTH)) for depth in range(1, layers + 1)}
    mx.eval(list(states.values()))
    job = Job((1,) * rows, rows, rows, dropped_rows=0, taps=tuple(states), combine="concat", dtype="bfloat16")
    return lambda: export(select(states, [job]))


def frame(rows: int, layers: int) -> Step:
    """Build a reply in msgpack."""
    hidden_states, attention_mask = collate([embeds(rows, layers)])
    document = {
        "model": "demo",
        "preset": ZIMAGE.name,
        "num_tokens": [30],
        "truncated": [False],
        "usage": {"prompt_tokens": 30, "layers_run": 35},
        "hidden_states": hidden_states,
        "attention_mask": attention_mask,
    }
    return lambda: wire.pack_parts(document)


def name_model() -> Step:
    """At the start of a service that has a folder for results."""
    return lambda: model_identity(demo())


def name_result() -> Step:
    """Of one prompt."""
    identity, job = model_identity(demo()), job_for(demo(), KLEIN)
    return lambda: result_key(identity, job)


def write_result() -> Step:
    """7.9 MB."""
    folder, result = ResultFolder(Path(FOLDER.name), 2**33), embeds(512, 3)
    folder.open()
    return lambda: folder.write("0" * 64, result)


def read_result() -> Step:
    """7.9 MB from the page cache."""
    write_result()()
    folder = ResultFolder(Path(FOLDER.name), 2**33)
    folder.open()
    assert folder.read("0" * 64)
    return lambda: folder.read("0" * 64)


@asynccontextmanager
async def find(forget: bool) -> AsyncIterator[AsyncStep]:
    """The engine's answer to a cached prompt: from memory, or after a restart from the disk."""
    engine = Engine(ModelOptions("demo"), disk_cache_dir=Path(FOLDER.name))
    await engine.start()
    engine._cache.put(job_for(engine._guardian.serving().encoder, KLEIN), embeds(512, 3))
    await asyncio.sleep(1)  # until it has been written to the disk

    async def step() -> None:
        if forget:
            engine._cache._memory = MemoryCache(2**30)
        assert (await engine.encode([PROMPT], KLEIN)).cache == "hit"

    yield step
    await engine.close()


class NoModel:
    """A forward pass that takes no time."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> Mapping[Tap, Sequence[mx.array]]:
        return {tap: [mx.zeros((job.computed_rows, self.width)) for job in jobs] for tap in taps}

    def count_rows(self, lengths: Sequence[int]) -> int:
        return sum(lengths)


@asynccontextmanager
async def application() -> AsyncIterator[FastAPI]:
    """The app without a server, with a forward pass that takes no time."""
    app = create_app(Settings(model="demo", log_level="warning"))
    async with app.router.lifespan_context(app):
        assert await service_of(app).lifecycle.loaded()
        encoder = service_of(app).engine._guardian.serving().encoder
        encoder.forward = NoModel(encoder.config.hidden_size)
        yield app


async def ask(app: FastAPI, prompt: str, *headers: tuple[bytes, bytes]) -> None:
    """Call the app with POST /encode, as a server does."""
    body = json.dumps({"prompt": prompt, "preset": ZIMAGE.name}).encode()
    sent = [(b"host", b"localhost"), (b"content-type", b"application/json"), *headers]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/encode", "query_string": b""}
    parts = [{"type": "http.request", "body": body}]
    statuses = []

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Future()  # a client that stays connected

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    hold = Hold(BUDGET)
    state = {"received_at": time.perf_counter(), "hold": hold}  # what our server says beside a request
    await app({**scope, "headers": sent, "state": state}, receive, send)
    hold.release()
    assert statuses[0] == 200


@asynccontextmanager
async def answer_from_cache() -> AsyncIterator[AsyncStep]:
    """One client."""
    async with application() as app:
        yield lambda: ask(app, PROMPT)


@asynccontextmanager
async def answer_many() -> AsyncIterator[AsyncStep]:
    """AT_ONCE clients with prompts that are not cached."""
    number = count()
    async with application() as app:

        async def step() -> None:
            prompts = [f"{PROMPT} {next(number)}" for _ in range(AT_ONCE)]
            await asyncio.gather(*(ask(app, prompt, (b"cache-control", b"no-store")) for prompt in prompts))

        yield step


STEPS: dict[str, Callable[[], Step]] = {
    f"queue: {AT_ONCE} prompts": queue,
    "tokenize: z-image": tokenize,
    "select and export: z-image": partial(take, 52, 1),
    "select and export: klein": partial(take, 512, 3),
    "frame: z-image": partial(frame, 52, 1),
    "frame: klein": partial(frame, 512, 3),
    "cache: name the model": name_model,
    "cache: name a result": name_result,
    "cache: write 7.9 MB": write_result,
    "cache: read 7.9 MB": read_result,
}
ASYNC_STEPS: dict[str, Callable[[], AbstractAsyncContextManager[AsyncStep]]] = {
    "engine: klein in memory": partial(find, forget=False),
    "engine: klein on disk": partial(find, forget=True),
    "POST /encode: z-image in memory": answer_from_cache,
    f"POST /encode: z-image, {AT_ONCE} at once": answer_many,
}


def seconds(prepare: Callable[[], Step], loops: int) -> float:
    """Seconds that a step takes for `loops` calls."""
    step = prepare()
    started = time.perf_counter()
    for _ in range(loops):
        step()
    return time.perf_counter() - started


def seconds_on_loop(prepare: Callable[[], AbstractAsyncContextManager[AsyncStep]], loops: int) -> float:
    """Seconds that an asynchronous step takes for `loops` calls."""

    async def run() -> float:
        async with prepare() as step:
            started = time.perf_counter()
            for _ in range(loops):
                await step()
            return time.perf_counter() - started

    return asyncio.run(run())


def main() -> None:
    runner = pyperf.Runner(program_args=("-m", "benchmarks.micro"))
    for name, prepare in STEPS.items():
        runner.bench_time_func(name, partial(seconds, prepare))
    for name, prepare_on_loop in ASYNC_STEPS.items():
        runner.bench_time_func(name, partial(seconds_on_loop, prepare_on_loop))


if __name__ == "__main__":
    main()
