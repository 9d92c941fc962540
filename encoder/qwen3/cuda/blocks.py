"""Memory in blocks that are used again once nobody looks at them any more. Knows nothing of what it is memory of."""

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_BYTES = 2**20  # of a block; all are powers of two, so that one serves results of many sizes


class Block(NamedTuple):
    """Bytes at an address."""

    address: int
    nbytes: int


class Blocks:
    """Blocks that any thread may take, and let go of.

    Args:
        allocate: the address of so many bytes; None where there are none.
        free: gives back what is at an address.
        most_bytes: of all blocks together.
    """

    def __init__(self, allocate: Callable[[int], int | None], free: Callable[[int], None], most_bytes: int) -> None:
        self._allocate = allocate
        self._free = free
        self._most_bytes = most_bytes
        self._lock = Lock()  # for the next two
        self._idle: list[Block] = []
        self.nbytes = 0  # of all blocks
        self._returned: deque[Block] = deque()  # no lock: the last view may go while this very thread has it

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """So many bytes, until the array and all its views are gone; None where there is no room for them."""
        with self._lock:
            block = self._find(nbytes)
        if block is None:
            return None
        memory = (ctypes.c_uint8 * block.nbytes).from_address(block.address)
        weakref.finalize(memory, self._returned.append, block).atexit = False
        return np.ndarray((nbytes,), np.uint8, memoryview(memory))

    def _find(self, nbytes: int) -> Block | None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        fitting = [block for block in self._idle if block.nbytes >= nbytes]
        if not fitting:
            return self._new(max(LEAST_BYTES, 1 << (nbytes - 1).bit_length()))
        block = min(fitting, key=lambda block: block.nbytes)
        self._idle.remove(block)
        return block

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
