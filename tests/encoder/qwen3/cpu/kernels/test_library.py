"""The compiled kernels give what the text book gives, for each instruction set that this CPU has."""

import ctypes
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder.qwen3.cpu.kernels import library
from encoder.qwen3.cpu.kernels.library import (
    INSTRUCTION_SETS,
    Batch,
    Kernels,
    Layer,
    has_instructions,
    library_path,
    load_kernels,
)
from encoder.qwen3.rows import Span
from tests.encoder.qwen3.cpu.kernels.textbook import (
    EPSILON,
    Dims,
    Exact,
    Numbers,
    Weights,
    bits,
    cos_sin,
    exact,
    make_positions,
    random_numbers,
    random_weights,
    run_layer,
)

CLOSE = 1e-5  # of a row's size
SHAPES = [  # rows of x, inputs, outputs
    pytest.param(1, 24, 8, id="smaller-than-a-panel"),
    pytest.param(5, 24, 33, id="one-column-in-the-last-panel"),
    pytest.param(5, 24, 31, id="one-column-less-than-whole-panels"),
    pytest.param(14, 512, 64, id="whole-tiles"),
    pytest.param(15, 513, 63, id="one-input-more-than-a-block"),
    pytest.param(17, 33, 127, id="one-row-more-than-a-tile-of-amx"),
    pytest.param(43, 1100, 70, id="several-blocks"),
    pytest.param(200, 40, 96, id="many-tiles"),
    pytest.param(515, 600, 40, id="several-blocks-of-rows"),
]
DIMS = [
    pytest.param(Dims(24, 40, 4, 2, 8), id="grouped"),
    pytest.param(Dims(33, 47, 3, 3, 10), id="ungrouped-odd"),
    pytest.param(Dims(24, 40, 16, 1, 40), id="more-heads-to-a-group-than-rows-to-a-tile"),
    pytest.param(Dims(130, 600, 2, 1, 128), id="as-qwen3"),
    pytest.param(Dims(24, 40, 1, 1, 512), id="the-largest-heads"),
]
BATCHES = [  # of each prompt: its tokens from and to, and its live rows
    pytest.param([Span(0, 1, 1, 1)], id="one-token"),
    pytest.param([Span(0, 3, 60, 60), Span(3, 43, 60, 60), Span(43, 60, 60, 60)], id="three-prompts"),
    pytest.param([Span(0, 9, 12, 40), Span(9, 12, 40, 41)], id="live-rows"),
    pytest.param([Span(0, 0, 5, 8), Span(0, 5, 8, 8)], id="live-rows-of-an-empty-prompt"),
    pytest.param([Span(0, 513, 516, 530), Span(513, 516, 530, 530)], id="one-key-more-than-fits-at-once"),
    pytest.param([Span(0, 1100, 1100, 1100)], id="three-times-the-keys-that-fit-at-once"),
]


def usable() -> list[str]:
    names = [name for name in INSTRUCTION_SETS if library_path(name).exists() and has_instructions(name)]
    return [name for name in names if ctypes.CDLL(str(library_path(name))).qwen3_start() == 0]


pytestmark = pytest.mark.skipif(not usable(), reason="no kernels were compiled for this CPU")


@pytest.fixture(params=usable())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param, library_path(request.param))


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def run(
    kernels: Kernels,
    layers: Sequence[Weights],
    dims: Dims,
    spans: Sequence[Span],
    x: Numbers,
    bfloat16: bool,
    threads: int,
) -> Numbers:
    """What the kernels make of x."""
    scale = np.float32(math.log2(math.e) / math.sqrt(dims.head_dim))
    kept: list[Any] = []
    structures = []
    for weights in layers:
        q, k, v, o, gate, up, down = (bits(matrix) if bfloat16 else matrix for matrix in weights.matrices)
        matrices = [
            kernels.prepack([q, k, v], threads),
            kernels.prepack([o], threads),
            kernels.prepack([gate, up], threads, interleave=True),
            kernels.prepack([down], threads),
        ]
        norms = [weights.input_norm, weights.post_attention_norm, weights.q_norm * scale, weights.k_norm]
        kept.append((matrices, norms))
        structures.append(Layer(*(array.ctypes.data for array in [*matrices, *norms])))
    positions = make_positions(spans, len(x))
    cos, sin = cos_sin(positions, dims.head_dim)
    places = np.array(spans, np.int32)
    tokens = max(span.stop for span in spans)
    batch = Batch(places.ctypes.data, cos.ctypes.data, sin.ctypes.data, len(spans), len(x), tokens)
    out = x.copy()
    array = (Layer * len(structures))(*structures)
    kernels.run_layers(library.Dims(*dims, bfloat16, EPSILON), array, len(structures), batch, out, threads)
    return out


def expected(layers: Sequence[Weights], dims: Dims, spans: Sequence[Span], x: Numbers) -> Exact:
    cos, sin = cos_sin(make_positions(spans, len(x)), dims.head_dim)
    out = x.astype(np.float64)
    for weights in layers:
        out = run_layer(out, weights, dims, spans, cos, sin)
    return out


def rows_of(spans: Sequence[Span]) -> int:
    return max(max(span.stop, span.live_stop) for span in spans)


def largest_error(found: Numbers, wanted: Exact) -> float:
    """Relative to the size of each row."""
    return float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_a_product_is_that_of_the_matrix(
    kernels: Kernels, bfloat16: bool, rows: int, inputs: int, outputs: int
) -> None:
    """To a few of float32's last bits of what is added up."""
    x, matrix = random_numbers(rows, inputs), random_numbers(outputs, inputs, bfloat16=bfloat16)
    panels = kernels.prepack([bits(matrix) if bfloat16 else matrix], threads=2)

    product = kernels.multiply(x, panels, outputs, bfloat16, threads=2)

    added_up = exact(np.abs(x), np.abs(matrix))
    assert (np.abs(product - exact(x, matrix)) / added_up).max() < 2e-6


def test_a_product_of_numbers_of_very_different_size_keeps_all_their_bits(kernels: Kernels, bfloat16: bool) -> None:
    """AMX multiplies a float32 as three bfloat16s: none of them may be lost."""
    x = random_numbers(20, 64) * np.float32(2.0) ** np.arange(-20, 44, dtype=np.float32)
    matrix = random_numbers(40, 64, bfloat16=bfloat16)
    panels = kernels.prepack([bits(matrix) if bfloat16 else matrix], threads=1)

    product = kernels.multiply(x, panels, 40, bfloat16, threads=1)

    assert (np.abs(product - exact(x, matrix)) / exact(np.abs(x), np.abs(matrix))).max() < 2e-6


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("spans", BATCHES)
def test_a_layer_is_that_of_the_text_book(kernels: Kernels, bfloat16: bool, dims: Dims, spans: list[Span]) -> None:
    weights, x = [random_weights(dims, 1, bfloat16)], random_numbers(rows_of(spans), dims.hidden_size)

    out = run(kernels, weights, dims, spans, x, bfloat16, threads=2)

    assert largest_error(out, expected(weights, dims, spans, x)) < CLOSE


def test_several_layers_run_one_after_the_other(kernels: Kernels, bfloat16: bool) -> None:
    dims, spans = Dims(33, 47, 4, 2, 10), [Span(0, 9, 12, 40), Span(9, 12, 40, 41)]
    layers = [random_weights(dims, seed, bfloat16) for seed in range(3)]
    x = random_numbers(41, dims.hidden_size)

    out = run(kernels, layers, dims, spans, x, bfloat16, threads=2)

    assert largest_error(out, expected(layers, dims, spans, x)) < CLOSE


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(kernels: Kernels, bfloat16: bool, threads: int) -> None:
    """Bit for bit: results on disk serve machines with other numbers of CPUs."""
    dims, spans = Dims(130, 300, 6, 2, 24), [Span(0, 300, 309, 340), Span(300, 309, 340, 350)]
    layers = [random_weights(dims, seed, bfloat16) for seed in range(2)]
    x = random_numbers(350, dims.hidden_size)

    alone = run(kernels, layers, dims, spans, x, bfloat16, threads=1)

    np.testing.assert_array_equal(run(kernels, layers, dims, spans, x, bfloat16, threads), alone)


def test_a_prompt_gives_the_same_bits_whatever_runs_beside_it(kernels: Kernels, bfloat16: bool) -> None:
    dims, spans = Dims(48, 90, 6, 2, 24), [Span(0, 30, 171, 180), Span(30, 31, 180, 180), Span(31, 171, 180, 181)]
    layers = [random_weights(dims, 5, bfloat16)]
    x = random_numbers(181, dims.hidden_size)
    together = run(kernels, layers, dims, spans, x, bfloat16, threads=2)

    for span in spans:
        mine = np.r_[span.start : span.stop, span.live : span.live_stop]
        tokens = span.stop - span.start
        alone = run(kernels, layers, dims, [Span(0, tokens, tokens, len(mine))], x[mine], bfloat16, threads=2)
        np.testing.assert_array_equal(together[mine], alone)


def test_a_pass_without_memory_is_an_error_and_changes_nothing(kernels: Kernels) -> None:
    """The process lives on, and so do all other batches."""
    code = f"""
import resource, numpy as np
from tests.encoder.qwen3.cpu.kernels.test_library import *
kernels = Kernels({kernels.instruction_set!r}, library_path({kernels.instruction_set!r}))
dims, spans = Dims(64, 64, 1, 1, 64), [Span(0, 40000, 40000, 40000)]
weights, x = [random_weights(dims, 1, False)], random_numbers(40000, 64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
before = x.copy()
try:
    run(kernels, weights, dims, spans, x, False, 2)
except MemoryError as error:
    print("refused:", error, (x == before).all())
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    assert "refused:" in finished.stdout and "True" in finished.stdout, finished.stderr


def test_no_library_means_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)

    assert load_kernels() is None


def test_a_library_that_is_not_ours_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that a power cut left empty, or another library: the next one serves, and the log says why."""
    [*_, slowest] = usable()
    for name in INSTRUCTION_SETS:
        if has_instructions(name):
            library_path(name)
            (tmp_path / f"layers_{name}.so").write_bytes(b"")
    (tmp_path / f"layers_{slowest}.so").unlink()
    (tmp_path / f"layers_{slowest}.so").symlink_to(library_path(slowest))
    monkeypatch.setattr(library, "FOLDER", tmp_path)

    found = load_kernels()

    assert found is not None and found.instruction_set == slowest


def test_matrices_of_several_dtypes_are_not_prepacked_together(kernels: Kernels) -> None:
    """The kernels would read the numbers of one as those of the other."""
    matrix = random_numbers(40, 24, bfloat16=True)

    with pytest.raises(ValueError, match=r"found float32 \(40, 24\), uint16 \(40, 24\), expected the same dtype"):
        kernels.prepack([matrix, bits(matrix)], threads=1)
