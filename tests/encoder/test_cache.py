import numpy as np

from encoder.cache import Cache
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


def test_an_equal_job_finds_the_result() -> None:
    cache = Cache(max_bytes=100)
    result = make_result(40)
    cache.put(make_job(1), result)

    assert cache.get(make_job(1)) is result
    assert cache.get(make_job(2)) is None
    assert cache.bytes == 40


def test_the_least_recently_used_result_goes_first() -> None:
    cache = Cache(max_bytes=100)
    for token in (1, 2):
        cache.put(make_job(token), make_result(40))
    cache.get(make_job(1))
    cache.put(make_job(3), make_result(40))

    assert cache.get(make_job(1)) is not None
    assert cache.get(make_job(2)) is None
    assert cache.bytes == 80


def test_a_result_larger_than_the_cache_drops_nothing() -> None:
    cache = Cache(max_bytes=100)
    cache.put(make_job(1), make_result(40))
    cache.put(make_job(2), make_result(400))

    assert cache.get(make_job(1)) is not None
    assert cache.get(make_job(2)) is None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = Cache(max_bytes=0)
    cache.put(make_job(1), make_result(4))

    assert cache.get(make_job(1)) is None
