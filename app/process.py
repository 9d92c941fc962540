"""What holds for the process as a whole: its standard files, thread switching, garbage collection, memory allocation.

The effect of each tuning was measured: docs/decisions/0007-what-the-service-adds.md.
"""

import ctypes
import gc
import logging
import os
import sys
import threading
from collections.abc import Mapping

logger = logging.getLogger(__name__)

COLLECT_AFTER = 10_000  # new objects; requests leave none behind that reference counting does not free
SWITCH_S = 0.001  # with Python's 5 ms the event loop makes the model thread wait while the GPU is idle
# glibc's tunables: the environment variable in which a user may set each, and its number and value for mallopt(3). The
# first is how many free bytes the end of a heap keeps, the second from how many on a block is a mapping of its own.
# Without them glibc raises both as it runs, and a service keeps for good what its busiest moment took. On a CPU, large
# results go back to the kernel: new pages cost less than the model takes for them. A GPU is faster, so there memory is
# kept, up to the largest values that are allowed.
MALLOC = {
    "cpu": {"MALLOC_TRIM_THRESHOLD_": (-1, 4 * 2**20), "MALLOC_MMAP_THRESHOLD_": (-3, 2**19)},
    "gpu": {"MALLOC_TRIM_THRESHOLD_": (-1, 128 * 2**20), "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 2**20)},
}
# Each thread would get a heap of its own, up to eight for each CPU, and each keeps what its busiest moment took.
HEAPS = {"MALLOC_ARENA_MAX": (-8, 2)}


def open_standard_files() -> None:
    """Let stdin, stdout and stderr lead nowhere where they are closed.

    The next file or connection that is opened would get their number, and what is printed would be written into it.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115  # open to the end


def log_uncaught_exceptions() -> None:
    """Log what threads and destructors raise. Python would print it, and wait for whoever reads stderr."""
    threading.excepthook = lambda raised: logger.error(
        "thread %s ended", raised.thread and raised.thread.name, exc_info=raised.exc_value
    )
    sys.unraisablehook = lambda raised: logger.error(
        "%s: %r", raised.err_msg or "exception ignored in", raised.object, exc_info=raised.exc_value
    )
    logging.captureWarnings(True)


def share_heaps() -> None:
    """Call before other threads begin."""
    _tune_malloc(HEAPS)


def tune_process(device: str) -> None:
    """Call once, after the model is loaded, so that memory freed while loading still goes back to the kernel.

    Args:
        device: that computes, a key of MALLOC.
    """
    sys.setswitchinterval(SWITCH_S)
    # Texts come one at a time; the tokenizer's thread pool only adds a switch between threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    gc.collect()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    gc.freeze()  # a full collection would walk all modules and routes, 50 ms during which no request is served
    _tune_malloc(MALLOC[device])


def _tune_malloc(tunables: Mapping[str, tuple[int, int]]) -> None:
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    for variable, (parameter, value) in tunables.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, value)


def return_memory() -> None:
    """Give free memory back to the kernel, wherever in a heap it lies. Takes milliseconds; safe on any thread."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if malloc_trim is not None:
        malloc_trim(0)
