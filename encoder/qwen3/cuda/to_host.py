"""Copies results to the host: started early, awaited late.

On a CUDA GPU a kernel writes them into page-locked memory of the host, which later results use again. MLX's own way
turns a buffer into unified memory, whose pages move to the host one by one when they are read: by the thread that
copies a result, or by the event loop that sends it. docs/decisions/0007-what-the-service-adds.md has the measurements.
On any other device the host reads the results where they are.
"""

import ctypes
import logging
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from encoder.qwen3.cuda.blocks import Blocks
from encoder.qwen3.cuda.kernels import cuda_kernel

logger = logging.getLogger(__name__)

MAX_BYTES = 256 * 2**20  # page-locked; when slow clients keep them all in use, results take MLX's own way
PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE: page-locked for every CUDA context
THREADS, THREAD_BLOCKS = 256, 32  # enough to saturate the bus
TEST_BYTES = 1001  # not a multiple of what a thread writes at once


class HostCopy(NamedTuple):
    """A copy to the host that has been described to MLX.

    Attributes:
        done: evaluated once the copy is complete. Where `host` is None, the bytes themselves.
        host: the memory that is copied to, or None where the host can read the bytes where they are.
    """

    done: mx.array
    host: NDArray[np.uint8] | None

    def wait(self) -> NDArray[np.uint8]:
        """The bytes, once they have been copied."""
        if self.host is None:
            return np.array(self.done, copy=False)
        mx.eval(self.done)
        return self.host


def copy_to_host(x: mx.array) -> HostCopy:
    """Describe to MLX how the bytes x, (n,) uint8, are copied to the host. Call on the model thread."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    page_locked = page_locked_memory() if on_gpu and x.size else None
    copy = page_locked.copy(x) if page_locked else None
    return copy or HostCopy(x, host=None)


class PageLockedMemory:
    """Host memory that a CUDA GPU writes to directly.

    Errors: OSError where there is no driver, RuntimeError where MLX cannot build the kernel.
    """

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._copy_out = cuda_kernel("copy_out", ["x", "address"], call="x, x_shape[0], address")
        self._blocks = Blocks(self._allocate, self._free, MAX_BYTES)

    @property
    def nbytes(self) -> int:
        """How much it is, in use or idle."""
        return self._blocks.nbytes

    def copy(self, x: mx.array) -> HostCopy | None:
        """As `copy_to_host`; None where there is no room."""
        host = self._blocks.take(x.size)
        if host is None:
            return None
        [done] = self._copy_out(
            inputs=[x, mx.array(np.array([host.ctypes.data], np.uint64))],
            grid=(THREADS * THREAD_BLOCKS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.uint8],
        )
        return HostCopy(done, host)

    def _allocate(self, nbytes: int) -> int | None:
        address = ctypes.c_void_p()
        if self._driver.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), PORTABLE):
            return None
        return address.value

    def _free(self, address: int) -> None:
        self._driver.cuCtxSynchronize()  # a kernel of a batch that failed may still write there
        self._driver.cuMemFreeHost(ctypes.c_void_p(address))


@cache
def page_locked_memory() -> PageLockedMemory | None:
    """The page-locked memory of this process, tested once; None where it cannot be used."""
    if not mx.cuda.is_available():
        return None
    sent = np.arange(TEST_BYTES).astype(np.uint8)
    try:
        memory = PageLockedMemory()
        copy = memory.copy(mx.array(sent))
        if copy is not None and np.array_equal(copy.wait(), sent):
            return memory
        logger.warning("The CUDA driver gives no page-locked memory, so copying results to the host takes longer.")
    except (OSError, RuntimeError) as error:
        logger.warning("Copying results to the host takes longer: %s", error)
    return None


def page_locked_bytes() -> int:
    """Page-locked memory that this process holds. Allocates none."""
    memory = page_locked_memory() if page_locked_memory.cache_info().currsize else None
    return memory.nbytes if memory else 0
