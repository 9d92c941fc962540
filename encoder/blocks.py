"""Memory in blocks that are used again once nobody looks at them any more. Knows nothing of what it is memory of."""

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_BYTES = 2**20  # of a block; all are powers of two, so that one serves results of many sizes


class Block(NamedTuple):
    """Bytes at an address."""

    address: int
    nbytes: int


class Blocks:
    """Blocks taken by one thread, and let go of by any.

    Args:
        allocate: the address of so many bytes; None where there are none.
        free: gives back what is at an address.
        most_bytes: of all blocks together.
    """

    def __init__(self, allocate: Callable[[int], int | None], free: Callable[[int], None], most_bytes: int) -> None:
        self._allocate = allocate
        self._free = free
        self._most_bytes = most_bytes
        self._idle: list[Block] = []
        self._returned: deque[Block] = deque()  # filled by whichever thread drops the last view, without a lock
        self.nbytes = 0  # of all blocks

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """So many bytes, until the array and all its views are gone; None where there is no room for them."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        block = min(
            (block for block in self._idle if block.nbytes >= nbytes), key=lambda block: block.nbytes, default=None
        )
        if block is not None:
            self._idle.remove(block)
        else:
            block = self._new(max(LEAST_BYTES, 1 << (nbytes - 1).bit_length()))
        if block is None:
            return None
        memory = (ctypes.c_uint8 * block.nbytes).from_address(block.address)
        weakref.finalize(memory, self._returned.append, block).atexit = False
        return np.ndarray((nbytes,), np.uint8, memoryview(memory))

    def _new(self, nbytes: int) -> Block | None:
        if self.nbytes - sum(block.nbytes for block in self._idle) + nbytes > self._most_bytes:
            return None
        while self.nbytes + nbytes > self._most_bytes:
            idle = self._idle.pop()
            self._free(idle.address)
            self.nbytes -= idle.nbytes
        address = self._allocate(nbytes)
        if address is None:
            return None
        self.nbytes += nbytes
        return Block(address, nbytes)
