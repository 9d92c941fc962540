"""How results are copied to the host. Page-locked memory needs an NVIDIA GPU."""

import logging

import mlx.core as mx
import numpy as np
import pytest

from encoder.qwen3.cuda import to_host
from encoder.qwen3.cuda.to_host import HostCopy, PageLockedMemory, copy_to_host, page_locked_memory

HAS_GPU = mx.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")


def some_bytes(count: int) -> mx.array:
    return mx.array(np.random.default_rng(count).integers(0, 256, count).astype(np.uint8))


def test_on_a_cpu_bytes_are_read_where_they_are() -> None:
    with mx.stream(mx.cpu):
        x = some_bytes(1000) + mx.array(0, mx.uint8)
        copy = HostCopy(x, host=None)

    np.testing.assert_array_equal(copy.wait(), np.array(x))
    assert np.shares_memory(copy.wait(), np.array(x, copy=False))


def test_a_gpu_that_is_not_the_default_device_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_host, "page_locked_memory", pytest.fail)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert copy_to_host(some_bytes(3)).host is None
    finally:
        mx.set_default_device(device)


@pytest.mark.skipif(HAS_GPU, reason="what a machine without a GPU does")
def test_without_a_gpu_there_is_no_page_locked_memory() -> None:
    assert page_locked_memory() is None
    assert copy_to_host(some_bytes(3)).host is None


def test_without_page_locked_memory_mlx_copies_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> PageLockedMemory:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(to_host, "PageLockedMemory", broken)
    page_locked_memory.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = page_locked_memory()
    page_locked_memory.cache_clear()

    assert found is None
    assert "Copying results to the host takes longer: libcuda.so.1" in caplog.text


@needs_gpu
@pytest.mark.parametrize("start", [0, 1, 16])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 4096, 1_000_003, 20_000_000])
def test_on_a_gpu_all_bytes_arrive_wherever_they_begin(count: int, start: int) -> None:
    x = some_bytes(count + start)[start:]
    copy = copy_to_host(x)

    assert copy.host is not None
    np.testing.assert_array_equal(copy.wait(), np.array(x))


@needs_gpu
def test_on_a_gpu_results_in_use_are_not_overwritten() -> None:
    sent = [some_bytes(1_000_000 + turn) for turn in range(8)]
    copies = [copy_to_host(x) for x in sent]
    mx.async_eval([copy.done for copy in copies])

    for x, copy in zip(sent, copies, strict=True):
        np.testing.assert_array_equal(copy.wait(), np.array(x))


@needs_gpu
def test_on_a_gpu_without_room_mlx_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_host, "MAX_BYTES", 2**20)
    pinned = PageLockedMemory()
    monkeypatch.setattr(to_host, "page_locked_memory", lambda: pinned)
    first, second = copy_to_host(some_bytes(1000)), copy_to_host(some_bytes(1001))

    assert (first.host is None, second.host is None) == (False, True)
    np.testing.assert_array_equal(second.wait(), np.array(some_bytes(1001)))
