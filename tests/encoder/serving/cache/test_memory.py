import numpy as np

from encoder.serving.cache.memory import MemoryCache, entry_bytes
from encoder.types import Job, PromptEmbeds, Tap


def make_job(token: int) -> Job:
    return Job(
        input_ids=(token,),
        computed_rows=1,
        delivered_rows=1,
        dropped_rows=0,
        taps=(Tap(1, False),),
        combine="concat",
        dtype="float32",
    )


def make_result(size: int) -> PromptEmbeds:
    return PromptEmbeds(np.zeros((1, size // 4), np.float32), np.ones(1, np.bool_), "float32")


ENTRY = entry_bytes(make_job(1), make_result(4000))


def test_an_equal_job_finds_the_result() -> None:
    cache = MemoryCache(max_bytes=ENTRY)
    result = make_result(4000)
    cache.put(make_job(1), result)

    assert cache.get(make_job(1)) is result
    assert cache.get(make_job(2)) is None
    assert (cache.bytes, len(cache)) == (ENTRY, 1)


def test_an_entry_counts_its_key_and_objects_too() -> None:
    """A thousand results of few bytes take more than their bytes."""
    assert ENTRY > 4000 + 1 + 800


def test_the_least_recently_used_result_goes_first() -> None:
    cache = MemoryCache(max_bytes=2 * ENTRY)
    for token in (1, 2):
        cache.put(make_job(token), make_result(4000))
    cache.get(make_job(1))
    cache.put(make_job(3), make_result(4000))

    assert cache.get(make_job(1)) is not None
    assert cache.get(make_job(2)) is None
    assert (cache.bytes, len(cache), cache.evictions) == (2 * ENTRY, 2, 1)


def test_a_newer_result_takes_the_place_of_the_old_one() -> None:
    cache = MemoryCache(max_bytes=2 * ENTRY)
    old, new = make_result(4000), make_result(2000)
    cache.put(make_job(1), old)
    cache.put(make_job(1), new)

    assert cache.get(make_job(1)) is new
    assert (cache.bytes, len(cache), cache.evictions) == (ENTRY - 2000, 1, 0)


def test_a_result_larger_than_the_cache_drops_nothing() -> None:
    cache = MemoryCache(max_bytes=2 * ENTRY)
    cache.put(make_job(1), make_result(4000))
    cache.put(make_job(2), make_result(40_000))

    assert cache.get(make_job(1)) is not None
    assert cache.get(make_job(2)) is None
    assert cache.evictions == 0


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = MemoryCache(max_bytes=0)
    cache.put(make_job(1), make_result(4))

    assert cache.get(make_job(1)) is None
