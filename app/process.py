"""How the process of a service runs: its threads, its garbage collector, its memory.

What each is worth was measured in docs/decisions/0007-what-the-service-adds.md.
"""

import ctypes
import gc
import os
import sys

COLLECT_AFTER = 10_000  # new objects; no request leaves any behind that only the collector finds
SWITCH_S = 0.001  # Python's 5 ms let the event loop keep the model's thread from a GPU that waits
# glibc's parameters by the variables in which a user may set them, and as mallopt(3) takes them. A service that has
# freed a result soon needs memory for another, and pages new from the kernel cost more than the copy into them.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 128 * 2**20),  # bytes free at the end of a heap that are kept
    "MALLOC_MMAP_THRESHOLD_": (-3, 32 * 2**20),  # bytes from which on a block is a mapping of its own; the largest
}


def tune_process() -> None:
    """Once, when the model is loaded: what that has freed goes back to the kernel as ever."""
    sys.setswitchinterval(SWITCH_S)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time: its own threads only add a way
    gc.collect()
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    gc.freeze()  # modules and routes stay; else a full collection looks at all of them, 50 ms in which nobody is served
    if sys.platform == "linux":
        _keep_memory()


def _keep_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries have none
    for variable, (parameter, value) in MALLOC.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, value)
