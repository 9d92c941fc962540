"""A pool of memory blocks. A block is used again once no array refers to it. Knows nothing of the kind of memory."""

import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_BLOCK_BYTES = 2**20  # all sizes are powers of two, so that one block serves results of many sizes


class Block(NamedTuple):
    """Bytes at an address."""

    address: int
    nbytes: int


class Blocks:
    """Blocks that any thread may take and return.

    Args:
        allocate: returns the address of so many bytes, or None where there are none.
        free: gives back the memory at an address.
        max_bytes: of all blocks together.
    """

    def __init__(self, allocate: Callable[[int], int | None], free: Callable[[int], None], max_bytes: int) -> None:
        self._allocate = allocate
        self._free = free
        self._max_bytes = max_bytes
        self._lock = Lock()  # guards the next two
        self._idle: list[Block] = []
        self.nbytes = 0  # of all blocks
        # Without the lock: the last view of a block may be collected while this very thread holds it.
        self._returned: deque[Block] = deque()

    def take(self, nbytes: int) -> NDArray[np.uint8] | None:
        """An array of so many bytes, or None where there is no room. Its block returns with its last view."""
        with self._lock:
            block = self._find(nbytes)
        if block is None:
            return None
        memory = (ctypes.c_uint8 * block.nbytes).from_address(block.address)
        weakref.finalize(memory, self._returned.append, block).atexit = False
        return np.ndarray((nbytes,), np.uint8, memoryview(memory))

    def _find(self, nbytes: int) -> Block | None:
        """The smallest idle block that is large enough, else a new one."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        fitting = [block for block in self._idle if block.nbytes >= nbytes]
        if not fitting:
            return self._new(max(MIN_BLOCK_BYTES, 1 << (nbytes - 1).bit_length()))
        block = min(fitting, key=lambda block: block.nbytes)
        self._idle.remove(block)
        return block

    def _new(self, nbytes: int) -> Block | None:
        """Allocate a block, after freeing idle ones where the bound requires it."""
        if self.nbytes - sum(block.nbytes for block in self._idle) + nbytes > self._max_bytes:
            return None
        while self.nbytes + nbytes > self._max_bytes:
            idle = self._idle.pop()
            self._free(idle.address)
            self.nbytes -= idle.nbytes
        address = self._allocate(nbytes)
        if address is None:
            return None
        self.nbytes += nbytes
        return Block(address, nbytes)
