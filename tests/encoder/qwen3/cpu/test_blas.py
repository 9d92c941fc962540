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


def run(code: str, **environment: str) -> tuple[dict[str, Any], str]:
    """What `code` leaves in `result`, and what it logged."""
    script = PRELUDE + textwrap.dedent(code) + "\nprint(json.dumps(result))"
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1]), finished.stderr


def has_system_openblas() -> bool:
    probe = "import ctypes; ctypes.CDLL('libopenblas.so.0')"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def has_scipy_openblas32() -> bool:
    installed = {distribution.name.lower() for distribution in metadata.distributions()}
    return "scipy-openblas32" in installed and (PACKAGE / "qwen3/cpu/kernels/blas_shim.so").exists()


needs_package = pytest.mark.skipif(
    not has_scipy_openblas32(), reason="needs scipy-openblas32, from the cpu extra, and the compiled shim"
)
DEFAULT = "result = dataclasses.asdict(blas.activate())"
SCIPY = 'result = dataclasses.asdict(blas.activate(sources=["scipy-openblas32"]))'


@needs_package
def test_scipy_openblas32_takes_the_place_of_the_reference_blas() -> None:
    """The product that MLX computes comes from the library that is reported, and is right."""
    code = f"{SCIPY}\n{PRODUCT}\nresult['error'] = error\nresult['mapped'] = Path('/proc/self/maps').read_text()"
    result, log = run(code)

    assert (result["name"], result["source"]) == ("OpenBLAS", "scipy-openblas32")
    assert result["version"].startswith("0.3.")
    assert Path(result["path"]).name == "libscipy_openblas.so" and result["path"] in result["mapped"]
    assert result["error"] < 1e-4  # float32 sums of 96 products of order one
    assert "INFO" in log and "WARNING" not in log


@pytest.mark.skipif(not has_system_openblas(), reason="no system OpenBLAS")
def test_system_openblas_is_preferred() -> None:
    """The distribution keeps it up to date."""
    result, _ = run(f"{DEFAULT}\n{PRODUCT}\nresult['error'] = error")

    assert result["source"] == "system"
    assert result["error"] < 1e-4


def test_reference_blas_is_reported_with_the_remedy() -> None:
    """An install without any OpenBLAS works, slowly, and says what to do."""
    code = """
    sys.path[:] = [path for path in sys.path if "site-packages" not in path]  # no scipy-openblas32
    blas.SYSTEM_NAMES = ("libnowhere.so.0",)
    result = dataclasses.asdict(blas.activate())
    """
    result, log = run(code)

    assert result["source"] == "reference"
    assert "apt-get install libopenblas0-pthread" in result["remedy"]
    assert "libnowhere.so.0" in result["remedy"] and "scipy-openblas32 is not installed" in result["remedy"]
    assert "WARNING" in log and result["remedy"] in log


def test_activation_after_mlx_warns_that_it_is_too_late() -> None:
    """The linker has made its choice when mlx.core is imported; claiming otherwise would hide an 80-fold loss."""
    result, log = run(f"import mlx.core\n{DEFAULT}")

    assert result["source"] == "reference"
    assert "mlx.core was imported before" in log


@pytest.mark.skipif(not has_system_openblas(), reason="no system OpenBLAS")
def test_preloaded_blas_is_kept() -> None:
    """Who sets LD_PRELOAD has chosen."""
    result, _ = run(DEFAULT, LD_PRELOAD="libopenblas.so.0")

    assert (result["name"], result["source"]) == ("OpenBLAS", "preloaded")


@needs_package
def test_a_preloaded_library_that_is_no_fast_blas_is_told(tmp_path: Path) -> None:
    """The shim alone, preloaded with the library that it needs, is named by its file."""
    slow = tmp_path / "slow.so"
    source = tmp_path / "slow.c"
    source.write_text("void cblas_sgemm(void) {}")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", slow, source], check=True)
    result, log = run(DEFAULT, LD_PRELOAD=str(slow))

    assert result["source"] == "reference"
    assert str(slow) in result["remedy"] and "WARNING" in log


@needs_package
def test_without_the_compiled_shim_scipy_openblas32_is_not_used(tmp_path: Path) -> None:
    code = f"""
    blas.SHIM = Path({str(tmp_path)!r}, "blas_shim.so")
    result = dataclasses.asdict(blas.activate(sources=["scipy-openblas32"]))
    """
    result, _ = run(code)

    assert result["source"] == "reference"
    assert "blas_shim.so was not compiled" in result["remedy"]


def test_library_without_blas_is_refused() -> None:
    """A name that the linker finds is not yet an OpenBLAS with 32-bit integers."""
    code = """
    blas.SYSTEM_NAMES = ("libm.so.6",)
    result = dataclasses.asdict(blas.activate(sources=["system"]))
    """
    result, _ = run(code)

    assert result["source"] == "reference"
    assert "libm.so.6 does not export cblas_sgemm" in result["remedy"]


@needs_package
def test_library_with_64_bit_integers_is_refused() -> None:
    """MLX passes 32-bit sizes; an ILP64 library would read past them."""
    code = """
    blas._openblas_config = lambda library, prefix: "OpenBLAS 0.3.34 USE64BITINT DYNAMIC_ARCH"
    result = dataclasses.asdict(blas.activate(sources=["scipy-openblas32"]))
    """
    result, _ = run(code)

    assert result["source"] == "reference"
    assert "ILP64" in result["remedy"]


@needs_package
@pytest.mark.parametrize(
    ("environment", "pin"),
    [
        pytest.param({"OPENBLAS_NUM_THREADS": "1"}, "", id="OPENBLAS_NUM_THREADS"),
        pytest.param({"OMP_NUM_THREADS": "1"}, "", id="OMP_NUM_THREADS"),
        pytest.param({}, "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n", id="affinity"),
        pytest.param({}, "blas.CPU_MAX = Path(os.environ['QUOTA'])\n", id="quota"),
    ],
)
def test_threads_follow_the_environment_the_affinity_and_the_quota(
    tmp_path: Path, environment: dict[str, str], pin: str
) -> None:
    """A container with one CPU must not run a thread for each CPU of the machine."""
    quota = tmp_path / "cpu.max"
    quota.write_text("90000 100000\n")
    result, _ = run(pin + SCIPY, QUOTA=str(quota), **environment)

    assert result["threads"] == 1


def test_second_activation_returns_the_first_answer() -> None:
    """The choice cannot be taken back, so asking again must not pretend to."""
    code = """
    first = blas.activate(sources=[])
    result = {"same": blas.activate() is first}
    """
    result, log = run(code)

    assert result["same"]
    assert log.count("WARNING") == 1
