"""What a result of FLUX.2 klein's size costs the cache: found in memory, found on disk, written, read, named.

The demo checkpoint stands in for the model, a random result of 512 rows and 3 × 2560 numbers for what it would compute.

    python benchmarks/cache.py
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from encoder import Engine, PromptEmbeds, get_preset
from encoder.cache.folder import ResultFolder
from encoder.cache.key import model_identity, result_key
from encoder.cache.memory import MemoryCache

KLEIN = get_preset("flux2-klein")
NUMBERS = np.random.default_rng(0).integers(0, 60_000, (512, 3 * 2560), dtype=np.uint16)
RESULT = PromptEmbeds(NUMBERS, np.arange(512) < 30, "bfloat16")


def report(name: str, seconds: list[float]) -> None:
    print(f"{name:28} p50 {statistics.median(seconds) * 1e3:8.3f} ms   min {min(seconds) * 1e3:8.3f} ms")


def time_calls(name: str, call: Callable[[], object], times: int) -> None:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    report(name, seconds)


async def time_hits(name: str, call: Callable[[], Awaitable[float]], times: int) -> None:
    report(name, [await call() for _ in range(times)])


async def main(folder: Path) -> None:
    engine = Engine("demo", disk_cache_dir=folder)
    await engine.start()
    encoder = engine._loaded()
    [job] = encoder.plan(encoder.tokenize(["a cat"], KLEIN), KLEIN, "bfloat16")
    engine._cache.put(job, RESULT)

    async def hit() -> float:
        started = time.perf_counter()
        assert (await engine.encode(["a cat"], KLEIN)).cache == "hit"
        return time.perf_counter() - started

    async def hit_on_disk() -> float:
        engine._cache._memory = MemoryCache(2**30)
        return await hit()

    await time_hits("encode, from memory", hit, 300)
    await asyncio.sleep(1)  # it is written by then
    await time_hits("encode, from disk", hit_on_disk, 30)
    await engine.close()

    identity = model_identity(encoder)
    key = result_key(identity, job)
    files = ResultFolder(folder, 2**33)
    files.open()
    time_calls("write 7.9 MB", lambda: files.write(key, RESULT), 30)
    time_calls("read 7.9 MB", lambda: files.read(key), 30)
    time_calls("name a result", lambda: result_key(identity, job), 100)
    time_calls("name the model, at the start", lambda: model_identity(encoder), 5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(main(Path(scratch)))
