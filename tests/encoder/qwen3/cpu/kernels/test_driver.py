"""The kernels read and write nothing beyond their arrays, and compute the same on other processors, in an emulator."""

import math
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from encoder.qwen3.cpu.kernels import library
from encoder.qwen3.cpu.kernels.library import has_instructions
from encoder.qwen3.rows import Span
from tests.encoder.qwen3.cpu.kernels.test_library import CLOSE, expected, largest_error, rows_of
from tests.encoder.qwen3.cpu.kernels.textbook import (
    EPSILON,
    Dims,
    Numbers,
    Weights,
    bits,
    cos_sin,
    make_positions,
    random_numbers,
    random_weights,
)

HERE = Path(__file__).parent
SOURCES = HERE.parents[4] / "encoder" / "qwen3" / "cpu" / "kernels" / "c"
COMPILE = ["-std=gnu11", "-O1", "-g", "-fopenmp-simd", "-pthread", f"-I{SOURCES}", str(HERE / "driver.c"), "-lm"]
FLAGS = {  # of setup.py
    "amx": ["-mavx512f", "-mamx-tile", "-mamx-bf16"],
    "avx512": ["-mavx512f"],
    "avx2": ["-mavx2", "-mfma"],
    "neon": [],
}
# The driver leaves its own arrays to the end of the process.
QUIET = {"ASAN_OPTIONS": "detect_leaks=0"}
HERE_RUN = [name for name in FLAGS if has_instructions(name)]
CASES = [
    pytest.param(Dims(33, 47, 3, 3, 10), [Span(0, 1, 1, 1)], id="one-token"),
    pytest.param(Dims(72, 104, 6, 2, 20), [Span(0, 9, 21, 40), Span(9, 21, 40, 41)], id="live-rows"),
    pytest.param(Dims(24, 40, 2, 1, 8), [Span(0, 0, 5, 8), Span(0, 5, 8, 8)], id="an-empty-prompt"),
    pytest.param(Dims(520, 530, 4, 1, 36), [Span(0, 530, 530, 530)], id="one-more-than-each-block"),
]
CASES_OF_AN_EMULATOR = [
    *CASES[:-1],
    pytest.param(Dims(520, 24, 2, 1, 36), [Span(0, 60, 60, 60)], id="two-blocks-of-inputs"),
]


def sanitized(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    program = tmp_path_factory.mktemp("driver") / name
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    finished = subprocess.run(
        ["cc", *FLAGS[name], *sanitizers, *COMPILE, "-o", program], capture_output=True, text=True
    )
    if finished.returncode and "cannot find" in finished.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert finished.returncode == 0, finished.stderr
    return program


@pytest.fixture(scope="session", params=HERE_RUN)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command: the kernels under the address sanitizer, for each instruction set that this CPU has."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return [str(sanitized(tmp_path_factory, request.param))]


@pytest.fixture(scope="session")
def neon_driver(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command: the kernels for 64-bit ARM, in an emulator."""
    compiler, emulator = "aarch64-linux-gnu-gcc", shutil.which("qemu-aarch64")
    if platform.machine() == "aarch64" or shutil.which(compiler) is None or emulator is None:
        pytest.skip(f"needs {compiler} and qemu-aarch64: apt-get install gcc-aarch64-linux-gnu qemu-user")
    program = tmp_path_factory.mktemp("driver") / "neon"
    subprocess.run([compiler, "-static", *COMPILE, "-o", program], check=True)
    return [emulator, str(program)]


def run(
    driver: Sequence[str],
    folder: Path,
    layers: Sequence[Weights],
    dims: Dims,
    spans: Sequence[Span],
    x: Numbers,
    bfloat16: bool,
) -> Numbers:
    """What a driver makes of x."""
    scale = np.float32(math.log2(math.e) / math.sqrt(dims.head_dim))
    cos, sin = cos_sin(make_positions(spans, len(x)), dims.head_dim)
    sizes = np.array([len(layers), 2, len(spans), len(x), max(span.stop for span in spans)], np.int32)
    parts = [bytes(library.Dims(*dims, bfloat16, EPSILON)), sizes, np.array(spans, np.int32), cos, sin, x]
    for weights in layers:
        parts += [bits(matrix) if bfloat16 else matrix for matrix in weights.matrices]
        parts += [weights.input_norm, weights.post_attention_norm, weights.q_norm * scale, weights.k_norm]
    case, result = folder / "case", folder / "result"
    case.write_bytes(
        b"".join(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes() for part in parts)
    )
    finished = subprocess.run([*driver, case, result], capture_output=True, text=True, timeout=300, env=QUIET)
    assert finished.returncode == 0, finished.stderr
    return np.frombuffer(result.read_bytes(), np.float32).reshape(x.shape)


def error_of(driver: Sequence[str], folder: Path, dims: Dims, spans: Sequence[Span], bfloat16: bool) -> float:
    """How far two layers of a driver are from the text book's, relative to the size of a row."""
    layers = [random_weights(dims, seed, bfloat16) for seed in range(2)]
    x = random_numbers(rows_of(spans), dims.hidden_size)
    return largest_error(run(driver, folder, layers, dims, spans, x, bfloat16), expected(layers, dims, spans, x))


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("dims", "spans"), CASES)
def test_nothing_beyond_an_array_is_touched(
    driver: list[str], tmp_path: Path, dims: Dims, spans: list[Span], bfloat16: bool
) -> None:
    """The driver fails where the sanitizer sees anything."""
    assert error_of(driver, tmp_path, dims, spans, bfloat16) < CLOSE


def test_the_sanitizer_would_see_one_number_too_many(driver: list[str], tmp_path: Path) -> None:
    """A case whose batch says one row more than there is."""
    dims, spans = Dims(24, 40, 2, 1, 8), [Span(0, 5, 5, 6)]
    layers, x = [random_weights(dims, 0, False)], random_numbers(5, 24)

    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        run(driver, tmp_path, layers, dims, spans, x, False)


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("dims", "spans"), CASES_OF_AN_EMULATOR)
def test_neon_gives_what_the_text_book_gives(
    neon_driver: list[str], tmp_path: Path, dims: Dims, spans: list[Span], bfloat16: bool
) -> None:
    assert error_of(neon_driver, tmp_path, dims, spans, bfloat16) < CLOSE
