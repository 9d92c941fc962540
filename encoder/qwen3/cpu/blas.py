"""Puts an optimised matrix product under MLX on Linux CPUs.

The `mlx` wheel for Linux links the reference BLAS, which is some eighty times slower than OpenBLAS. The dynamic linker
resolves `cblas_sgemm` from the process before it looks at what libmlx brought along, so an OpenBLAS that is loaded with
RTLD_GLOBAL before `mlx.core` is imported takes its place. docs/decisions/0001-interpose-openblas.md has the numbers.

Knows the dynamic linker and nothing of tensors; does not import MLX.
"""

import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

Source = Literal["system", "scipy-openblas32", "preloaded", "reference", "accelerate"]
Loadable = Literal["system", "scipy-openblas32"]

# Fedora's libopenblas.so.0 has one thread, so its threaded libopenblasp goes first; Debian has only the second name.
SYSTEM_NAMES = ("libopenblasp.so.0", "libopenblas.so.0")
SHIM = Path(__file__).parent / "kernels" / "blas_shim.so"  # of kernels/c/blas_shim.c
SCIPY_PREFIX = "scipy_"  # of the names in scipy-openblas32

# A symbol that each optimised BLAS exports beside cblas_sgemm; the reference BLAS has none of them.
MARKERS = {
    "openblas_get_config": "OpenBLAS",
    f"{SCIPY_PREFIX}openblas_get_config": "OpenBLAS",
    "MKL_Get_Version_String": "MKL",
    "bli_info_get_version_str": "BLIS",
}

# OpenBLAS reads these itself; without them it gets a thread for each CPU this process may use.
THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as seen from inside a container

INSTALL = (
    "Install one: apt-get install libopenblas0-pthread, or pip install scipy-openblas32 and this package as a wheel."
)
TOO_LATE = "mlx.core was imported before the BLAS was chosen. Import encoder, or call activate(), before mlx.core."


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that MLX multiplies float32 matrices with on the CPU.

    Attributes:
        name: of the implementation.
        version: where it says one.
        source: how it came into the process.
        path: of the file that was loaded; None where it is MLX's own.
        threads: that it uses; None where it does not say.
        remedy: what to do about it; only for the reference BLAS.
    """

    name: str
    version: str | None
    source: Source
    path: str | None
    threads: int | None
    remedy: str | None


class Unavailable(Exception):
    """One source has no BLAS that can be used; the message says why."""


_active: Blas | None = None
_lock = threading.Lock()


def activate(sources: Sequence[Loadable] = ("system", "scipy-openblas32")) -> Blas:
    """Make the fastest BLAS at hand the one that MLX uses, and log which it is.

    Call before `mlx.core` is imported. The first call decides for the process, later ones return its answer.

    Args:
        sources: which to try, in this order.
    """
    global _active
    with _lock:
        if _active is None:
            _active = _choose(sources)
            if _active.remedy:
                logger.warning("%s, about 80 times slower than OpenBLAS. %s", _active.name, _active.remedy)
            else:
                logger.info("BLAS is %s", _active)
        return _active


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, and its container's quota rounded up."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_MAX.read_text().split()
        return min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cpus


def _choose(sources: Sequence[Loadable]) -> Blas:
    if sys.platform == "darwin":
        return Blas("Accelerate", None, "accelerate", None, None, None)
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # LD_PRELOAD, or a program that embeds Python
        return _describe("preloaded", ctypes.CDLL(None))
    if "mlx.core" in sys.modules:  # measured: once libmlx is loaded, a library that is loaded later is not looked at
        return _reference(TOO_LATE)
    reasons = []
    for source in sources:
        try:
            return _describe(source, _load_system() if source == "system" else _load_scipy_openblas32())
        except Unavailable as reason:
            reasons.append(f"{source}: {reason}.")
    return _reference(" ".join([INSTALL, *reasons]))


def _load_system() -> ctypes.CDLL:
    reasons = []
    for name in SYSTEM_NAMES:
        try:
            library = _open(name, "")
        except Unavailable as reason:
            reasons.append(str(reason))
            continue
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        _check_resolves_to(library, name)
        return library
    raise Unavailable("; ".join(reasons))


def _load_scipy_openblas32() -> ctypes.CDLL:
    """Load the library of the package scipy-openblas32, and the shim that gives its functions their usual names."""
    try:
        path = _installed_file("scipy-openblas32", "libscipy_openblas.so")
    except metadata.PackageNotFoundError as error:
        raise Unavailable(f"package {error.name} is not installed") from error
    if not SHIM.exists():
        raise Unavailable(f"{SHIM.name} was not compiled; no C compiler was found when this package was installed")
    library = _open(str(path), SCIPY_PREFIX)
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # the shim finds its functions there
        shim = ctypes.CDLL(str(SHIM), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise Unavailable(str(error)) from error
    _check_resolves_to(shim, SHIM.name)
    return library


def _open(name: str, prefix: str) -> ctypes.CDLL:
    """A library, not yet visible to others, that is an OpenBLAS for MLX; its threads are set."""
    try:
        library = ctypes.CDLL(name, ctypes.RTLD_LOCAL)
    except OSError as error:
        raise Unavailable(str(error)) from error
    if not hasattr(library, f"{prefix}cblas_sgemm") or not hasattr(library, f"{prefix}openblas_get_config"):
        raise Unavailable(f"{name} does not export {prefix}cblas_sgemm and {prefix}openblas_get_config")
    if "USE64BITINT" in _openblas_config(library, prefix):
        raise Unavailable(f"{name} takes 64-bit integers (ILP64), MLX passes 32-bit ones")
    if not any(os.environ.get(name) for name in THREAD_SETTINGS):
        getattr(library, f"{prefix}openblas_set_num_threads")(available_cpus())
    return library


def _check_resolves_to(library: ctypes.CDLL, name: str) -> None:
    if _address(ctypes.CDLL(None).cblas_sgemm) != _address(library.cblas_sgemm):
        raise Unavailable(f"cblas_sgemm does not resolve to {name}")


def _installed_file(package: str, name: str) -> Path:
    """Path of a file by its name, from the record that pip keeps of an installed package."""
    for file in metadata.files(package) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise Unavailable(f"package {package} has no file {name}")


def _describe(source: Source, library: ctypes.CDLL) -> Blas:
    """The BLAS in `library`, as it describes itself."""
    marker = next((marker for marker in MARKERS if hasattr(library, marker)), None)
    if marker is None:
        path = _path_of(library.cblas_sgemm)
        return _reference(f"cblas_sgemm comes from {path}, no BLAS known to be fast. Check LD_PRELOAD.")
    name, path = MARKERS[marker], _path_of(getattr(library, marker))
    if name != "OpenBLAS":
        return Blas(name, None, source, path, None, None)
    prefix = marker.removesuffix("openblas_get_config")
    version = _openblas_config(library, prefix).split()[1]
    return Blas(name, version, source, path, int(getattr(library, f"{prefix}openblas_get_num_threads")()), None)


def _reference(remedy: str) -> Blas:
    return Blas("reference BLAS", None, "reference", None, 1, remedy)


def _openblas_config(library: ctypes.CDLL, prefix: str) -> str:
    """For example `OpenBLAS 0.3.34 NO_AFFINITY USE64BITINT DYNAMIC_ARCH Haswell MAX_THREADS=64`."""
    get_config = getattr(library, f"{prefix}openblas_get_config")
    get_config.restype = ctypes.c_char_p
    return str(get_config().decode())


def _address(function: object) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


class _DlInfo(ctypes.Structure):  # dladdr(3)
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _path_of(function: object) -> str | None:
    """File of the library that holds a function."""
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(_address(function)), ctypes.byref(info)):
        return None
    return os.fsdecode(info.dli_fname)
