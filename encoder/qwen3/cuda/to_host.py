"""Bytes leave MLX: told to early, waited for late.

On a CUDA GPU a kernel writes them into page-locked memory of the host, which the next results use again. MLX's own way
makes a buffer unified memory, whose pages come to the host one after the other when somebody reads them: the thread
that copies a result, or the event loop that sends it. docs/decisions/0007-what-the-service-adds.md has what that takes.
Everywhere else the host can read them where they are.
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

MOST_BYTES = 256 * 2**20  # page-locked; with replies that slow clients have not read, results go MLX's way
PORTABLE = 1  # cuMemHostAlloc's flag: page-locked for whichever context
THREADS, THREAD_BLOCKS = 256, 32  # enough for all that the bus carries
PROOF = 1001  # bytes, no multiple of what a thread writes at once


class Leaving(NamedTuple):
    """Bytes on their way.

    Attributes:
        done: evaluated when they are there. Where `host` is None, the bytes themselves.
        host: where they go to.
    """

    done: mx.array
    host: NDArray[np.uint8] | None

    def wait(self) -> NDArray[np.uint8]:
        """The bytes, once they are there."""
        if self.host is None:
            return np.array(self.done, copy=False)
        mx.eval(self.done)
        return self.host


def leave(x: mx.array) -> Leaving:
    """Describe to MLX how the bytes of x, (n,) uint8, come to the host. Call on the model thread."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    pinned = page_locked() if on_gpu and x.size else None
    leaving = pinned.leave(x) if pinned else None
    return leaving or Leaving(x, host=None)


class PageLocked:
    """Host memory that a CUDA GPU writes to by itself.

    Errors: OSError where there is no driver, RuntimeError where it refuses, or MLX cannot build the kernel.
    """

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._copy_out = cuda_kernel("copy_out", ["x", "address"], call="x, x_shape[0], address")
        self._blocks = Blocks(self._allocate, self._free, MOST_BYTES)

    def leave(self, x: mx.array) -> Leaving | None:
        """As `leave`; None where there is no room."""
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
        return Leaving(done, host)

    def _allocate(self, nbytes: int) -> int | None:
        address = ctypes.c_void_p()
        if self._driver.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), PORTABLE):
            return None
        return address.value

    def _free(self, address: int) -> None:
        self._driver.cuCtxSynchronize()  # a kernel may still write for a batch that has failed
        self._driver.cuMemFreeHost(ctypes.c_void_p(address))


@cache
def page_locked() -> PageLocked | None:
    """This process's, once proven; None where there is none."""
    if not mx.cuda.is_available():
        return None
    sent = np.arange(PROOF).astype(np.uint8)
    try:
        pinned = PageLocked()
        leaving = pinned.leave(mx.array(sent))
        if leaving is not None and np.array_equal(leaving.wait(), sent):
            return pinned
        logger.warning("The CUDA driver gives no page-locked memory, results take longer to the host.")
    except (OSError, RuntimeError) as error:
        logger.warning("Results take longer to the host: %s", error)
    return None
