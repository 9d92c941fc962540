"""Products with matrices laid out as panels are those of the matrices, for each instruction set this CPU has."""

import ctypes
import gc
import importlib.machinery
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.qwen3.cpu import panels_library
from encoder.qwen3.cpu.blas import activate
from encoder.qwen3.cpu.panels import ROOM, has_panels, lay
from encoder.qwen3.cpu.panels_library import INSTRUCTION_SETS, declare, instruction_set

SHAPES = [  # rows of x, inputs, outputs
    pytest.param(1, 24, 8, id="smaller-than-a-panel"),
    pytest.param(5, 24, 33, id="one-column-in-the-last-panel"),
    pytest.param(14, 512, 64, id="whole-tiles"),
    pytest.param(15, 513, 64, id="one-input-more-than-a-block"),
    pytest.param(43, 1100, 70, id="several-blocks"),
    pytest.param(200, 40, 96, id="many-tiles"),
    pytest.param(1030, 600, 40, id="more-rows-than-are-copied-at-once"),
]
Matrix = NDArray[np.float32]

RUNNABLE = [name for name in INSTRUCTION_SETS if panels_library.can_run(name) and panels_library.can_start(name)]

here = pytest.mark.skipif(not has_panels(), reason="kernels/c/panels.c was not compiled for this CPU")


def numbers(*shape: int, bfloat16: bool = False) -> Matrix:
    """Random; bfloat16s, when asked for, as float32."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if bfloat16 else values


def stored(weight: Matrix, bfloat16: bool) -> Any:
    return (weight.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else weight


def laid_by(library: ctypes.CDLL, weight: Matrix, bfloat16: bool) -> NDArray[np.uint8]:
    """Panels of a library that is not the one in use, of a weight (outputs, inputs)."""
    outputs, inputs = weight.shape
    whole = stored(weight, bfloat16)
    columns, panel_bytes = library.panels_columns(bfloat16), library.panels_bytes(inputs, bfloat16)
    memory = np.zeros(ROOM + -(-outputs // columns) * panel_bytes, np.uint8)
    panels = memory[library.panels_offset(memory.ctypes.data) :]
    library.panels_mark(panels.ctypes.data, inputs, outputs, bfloat16)
    for column in range(0, outputs, columns):
        rows, panel = whole[column:], panels[column // columns * panel_bytes :]
        library.panels_lay(rows.ctypes.data, inputs, len(rows), bfloat16, panel.ctypes.data)
    return panels


def multiply(library: ctypes.CDLL, x: Matrix, right: NDArray[np.uint8], outputs: int) -> Matrix:
    """x times what was laid out or marked; beside the rows of x stands what must not be read."""
    inputs = x.shape[1]
    wide = np.full((len(x), inputs + 40), np.nan, np.float32)
    wide[:, :inputs] = x
    result = np.full((len(x), outputs), np.nan, np.float32)
    a, b, c = (ctypes.c_void_p(array.ctypes.data) for array in (wide, right, result))
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    library.cblas_sgemm(101, 111, 111, len(x), outputs, inputs, one, a, inputs + 40, b, outputs, zero, c, outputs)
    return result


def exact(x: Matrix, weight: Matrix) -> Any:
    return x.astype(np.float64) @ weight.T.astype(np.float64)


def assert_close(ours: Any, x: Matrix, weight: Matrix) -> None:
    """To a few of float32's last bits of what was added up."""
    added_up = np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64)
    assert (np.abs(ours - exact(x, weight)) / added_up).max() < 2e-6


def laid(*weights: Any) -> mx.array:
    with ThreadPoolExecutor(2) as threads:
        return lay(weights, threads)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_each_instruction_set_gives_the_product(
    name: str, bfloat16: bool, rows: int, inputs: int, outputs: int
) -> None:
    library = declare(ctypes.CDLL(str(panels_library.find(name))))
    x, weight = numbers(rows, inputs), numbers(outputs, inputs, bfloat16=bfloat16)

    assert_close(multiply(library, x, laid_by(library, weight, bfloat16), outputs), x, weight)


@here
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_mlx_multiplies_with_them(bfloat16: bool) -> None:
    x, weight = numbers(9, 70), numbers(50, 70, bfloat16=bfloat16)
    matrix = laid(stored(weight, bfloat16))

    assert matrix.shape == (70, 50)
    assert_close(np.array(mx.array(x) @ matrix), x, weight)


@here
def test_x_may_be_transposed() -> None:
    x, weight = numbers(70, 9), numbers(50, 70)

    assert_close(np.array(mx.array(x).T @ laid(weight)), np.ascontiguousarray(x.T), weight)


@here
def test_matrices_laid_together_stand_side_by_side() -> None:
    x, first, second = numbers(9, 70), numbers(50, 70), numbers(31, 70)

    assert_close(np.array(mx.array(x) @ laid(first, second)), x, np.concatenate([first, second]))


@here
def test_a_row_of_x_gives_the_same_whatever_stands_beside_it() -> None:
    """Bit for bit: tiles of any height add in the same order."""
    x, matrix = numbers(61, 700), laid(stored(numbers(50, 700, bfloat16=True), True))
    together = np.array(mx.array(x) @ matrix)

    for row in (0, 13, 60):
        np.testing.assert_array_equal(np.array(mx.array(x[row : row + 1]) @ matrix)[0], together[row])


@here
def test_bfloat16s_take_half_the_memory() -> None:
    before = mx.get_active_memory()
    kept = [laid(numbers(512, 512))]
    whole = mx.get_active_memory() - before
    kept.append(laid(stored(numbers(512, 512), True)))

    assert mx.get_active_memory() - before - whole == pytest.approx(whole / 2, rel=0.01)


@here
def test_other_products_are_the_blas_own() -> None:
    x, weight = numbers(9, 70), numbers(50, 70)
    laid(weight)

    assert_close(np.array(mx.array(x) @ mx.array(weight).T), x, weight)
    assert activate().panels == instruction_set()
    assert "panels" not in str(activate().path)


@here
def test_a_product_outlives_whoever_asked_for_it() -> None:
    """MLX is lazy: the matrix is gone by name when it is multiplied with."""
    x, weight = numbers(9, 70), numbers(50, 70)
    later = mx.array(x) @ laid(weight)
    gc.collect()

    assert_close(np.array(later), x, weight)


@here
def test_arrays_that_lie_where_panels_lay_are_ordinary_ones() -> None:
    """Whatever a freed buffer is used for next, as a whole or from where the panels started."""
    x, weight = numbers(9, 64), numbers(64, 64)
    for _ in range(50):
        mx.eval(laid(weight))
        ordinary = mx.array(numbers(64, 64 + 1))
        for start in range(16):
            right = ordinary.flatten()[start * 4 : start * 4 + 64 * 62].reshape(64, 62)
            np.testing.assert_allclose(np.array(mx.array(x) @ right), x @ np.array(right), rtol=1e-4, atol=1e-4)


@here
def test_a_matrix_used_for_anything_else_is_no_silent_nonsense() -> None:
    script = (
        "import encoder, mlx.core as mx, numpy as np\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from encoder.qwen3.cpu.panels import lay\n"
        "matrix = lay([np.ones((32, 32), np.float32)], ThreadPoolExecutor(1))\n"
        "mx.eval(mx.addmm(mx.ones((4, 32)), mx.ones((4, 32)), matrix))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode < 0
    assert "laid out or marked as 32 by 32 was used as 32 by 32 in other than a plain product" in done.stderr


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 fma avx512f amx_bf16 amx_tile\n", {"amx", "avx512", "avx2"}),
        ("flags\t\t: fpu avx2 fma avx512f\n", {"avx512", "avx2"}),
        ("flags\t\t: fpu avx2 fma\n", {"avx2"}),
        ("flags\t\t: fpu avx2\n", set()),
        ("processor\t: 0\nFeatures\t: fp asimd crc32\n", {"neon"}),
        ("", set()),
    ],
)
def test_a_cpu_runs_what_it_says_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, expected: Sequence[str]
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    monkeypatch.setattr(panels_library, "CPUINFO", file)

    assert {name for name in INSTRUCTION_SETS if panels_library.can_run(name)} == expected


def test_a_library_that_is_not_ours_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a build of an empty file leaves it."""
    monkeypatch.setattr(panels_library, "FOLDER", tmp_path)
    blas = activate().path
    if blas is None:
        pytest.skip("no library at hand")
    for name in INSTRUCTION_SETS:
        (tmp_path / f"panels_{name}{importlib.machinery.EXTENSION_SUFFIXES[0]}").symlink_to(blas)

    assert instruction_set() is None


def test_nothing_compiled_means_no_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels_library, "FOLDER", tmp_path)

    assert instruction_set() is None
