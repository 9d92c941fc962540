"""Memory that is used again once nobody looks at it."""

import ctypes
from threading import Thread

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.qwen3.cuda.blocks import MIN_BLOCK_BYTES, Blocks


class Heap:
    """Real memory, and a record of what was allocated and freed."""

    def __init__(self) -> None:
        self.held: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.allocated: list[int] = []
        self.freed: list[int] = []

    def allocate(self, nbytes: int) -> int | None:
        buffer = ctypes.create_string_buffer(nbytes)
        self.held[ctypes.addressof(buffer)] = buffer
        self.allocated.append(nbytes)
        return ctypes.addressof(buffer)

    def free(self, address: int) -> None:
        self.freed.append(len(self.held.pop(address)))


@pytest.fixture
def heap() -> Heap:
    return Heap()


def blocks_of(heap: Heap, most: int = 8) -> Blocks:
    return Blocks(heap.allocate, heap.free, most * MIN_BLOCK_BYTES)


def taken(blocks: Blocks, nbytes: int) -> NDArray[np.uint8]:
    memory = blocks.take(nbytes)
    assert memory is not None
    assert memory.shape == (nbytes,)
    return memory


def address(array: NDArray[np.uint8]) -> int:
    return int(array.ctypes.data)


def test_blocks_in_use_do_not_overlap(heap: Heap) -> None:
    blocks = blocks_of(heap)
    first, second = taken(blocks, 3), taken(blocks, MIN_BLOCK_BYTES)
    first[:], second[:] = 1, 2

    assert set(first) == {1}
    assert set(second) == {2}


def test_a_block_is_used_again_when_its_last_view_is_gone(heap: Heap) -> None:
    blocks = blocks_of(heap)
    memory = taken(blocks, 100)
    place = address(memory)
    view = memoryview(memory[10:20].view(np.uint16)).cast("B")  # what a reply sends
    del memory

    other = taken(blocks, 100)
    assert address(other) != place
    del view
    assert address(taken(blocks, MIN_BLOCK_BYTES)) == place
    assert heap.allocated == [MIN_BLOCK_BYTES] * 2


def test_a_returned_block_is_given_out_once(heap: Heap) -> None:
    blocks = blocks_of(heap)
    taken(blocks, 100)
    first, second = taken(blocks, 100), taken(blocks, 100)

    assert not np.shares_memory(first, second)


def test_a_block_may_be_returned_by_another_thread(heap: Heap) -> None:
    """The event loop has sent the last reply."""
    blocks = blocks_of(heap)
    memories = [taken(blocks, 100)]
    place = address(memories[0])
    thread = Thread(target=memories.clear)
    thread.start()
    thread.join()

    assert address(taken(blocks, 100)) == place


def test_the_smallest_block_that_fits_is_taken(heap: Heap) -> None:
    blocks = blocks_of(heap)
    large, small = taken(blocks, 4 * MIN_BLOCK_BYTES), taken(blocks, 1)
    places = {"large": address(large), "small": address(small)}
    del large, small

    assert address(taken(blocks, 100)) == places["small"]
    assert address(taken(blocks, MIN_BLOCK_BYTES + 1)) == places["large"]


def test_one_block_serves_results_of_many_sizes(heap: Heap) -> None:
    blocks = blocks_of(heap)
    for nbytes in (5 * MIN_BLOCK_BYTES, 7 * MIN_BLOCK_BYTES, 8 * MIN_BLOCK_BYTES, 4 * MIN_BLOCK_BYTES + 1):
        taken(blocks, nbytes)

    assert heap.allocated == [8 * MIN_BLOCK_BYTES]


def test_the_bound_holds_and_blocks_in_use_stay(heap: Heap) -> None:
    """A slow client keeps the block of its reply in use."""
    blocks = blocks_of(heap, most=4)
    slow = [taken(blocks, MIN_BLOCK_BYTES) for _ in range(3)]

    assert blocks.take(2 * MIN_BLOCK_BYTES) is None
    assert heap.freed == []
    del slow[0]
    assert blocks.take(2 * MIN_BLOCK_BYTES) is not None
    assert blocks.nbytes == sum(map(len, heap.held.values())) <= 4 * MIN_BLOCK_BYTES


def test_a_request_beyond_the_bound_gets_none_and_frees_nothing(heap: Heap) -> None:
    blocks = blocks_of(heap, most=4)
    taken(blocks, MIN_BLOCK_BYTES)

    assert blocks.take(4 * MIN_BLOCK_BYTES + 1) is None
    assert heap.freed == []


def test_a_failed_allocation_is_not_counted() -> None:
    blocks = Blocks(lambda nbytes: None, lambda address: None, 4 * MIN_BLOCK_BYTES)

    assert blocks.take(1) is None
    assert blocks.nbytes == 0
