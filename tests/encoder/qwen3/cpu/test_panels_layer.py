"""An attention and an MLP by kernels/c/panels.c are those of the text book, for each instruction set this CPU has."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.qwen3.cpu import panels_library
from encoder.qwen3.cpu.panels import OPERATION, ROOM
from encoder.qwen3.cpu.panels_library import Attention, Batch, Mlp, declare
from tests.encoder.qwen3.cpu.test_panels import RUNNABLE, Matrix, laid_by, multiply, numbers

D, EPSILON = 24, 1e-6
CLOSE = 1e-5  # of a row's size
Exact = NDArray[np.float64]
Spans = Sequence[tuple[int, int, int, int]]


class Dims(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int


DIMS = [
    pytest.param(Dims(4, 2, 8), id="grouped"),
    pytest.param(Dims(3, 3, 10), id="ungrouped"),
    pytest.param(Dims(16, 1, 40), id="more-heads-to-a-group-than-rows-to-a-tile"),
    pytest.param(Dims(2, 1, 128), id="as-qwen3"),
    pytest.param(Dims(1, 1, 512), id="the-largest-heads"),
]

# Of each prompt: its real rows, from and to, and its live rows.
SPANS = [
    pytest.param([(0, 1, 1, 1)], id="one-token"),
    pytest.param([(0, 3, 60, 60), (3, 43, 60, 60), (43, 60, 60, 60)], id="three-prompts"),
    pytest.param([(0, 9, 12, 40), (9, 12, 40, 41)], id="live-rows"),
    pytest.param([(0, 0, 5, 8), (0, 5, 8, 8)], id="live-rows-of-an-empty-prompt"),
    pytest.param([(0, 513, 516, 530), (513, 516, 530, 530)], id="one-key-more-than-fits-at-once"),
    pytest.param([(0, 1100, 1100, 1100)], id="three-times-the-keys-that-fit-at-once"),
]


@pytest.fixture(params=RUNNABLE)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return declare(ctypes.CDLL(str(panels_library.find(request.param))))


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def marked(library: ctypes.CDLL, layer: Mlp | Attention, batch: Batch | None = None) -> NDArray[np.uint8]:
    """What rows are multiplied with."""
    memory = np.zeros(ROOM + OPERATION, np.uint8)
    offset = library.panels_offset(memory.ctypes.data)
    if isinstance(layer, Mlp):
        library.panels_mark_mlp(memory.ctypes.data + offset, layer)
    else:
        library.panels_mark_attention(memory.ctypes.data + offset, layer, batch)
    return memory[offset:]


def rms_norm(x: Any, weight: Any) -> Exact:
    exact = np.asarray(x, np.float64)
    return exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPSILON) * weight


def turn(x: Exact, angles: Exact) -> Exact:
    """RoPE of heads, (T, heads, d)."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def exact_attention(
    x: Matrix, weights: dict[str, Matrix], norms: dict[str, Matrix], angles: Exact, dims: Dims, spans: Spans
) -> Exact:
    """(T, D); rows of no prompt are zero."""
    d, h = dims.head_dim, rms_norm(x, norms["before"])
    q, k, v = ((h @ weights[name].T.astype(np.float64)).reshape(len(x), -1, d) for name in "qkv")
    q, k = turn(rms_norm(q, norms["q"]), angles), turn(rms_norm(k, norms["k"]), angles)
    k, v = (np.repeat(heads, dims.heads // dims.kv_heads, axis=1) for heads in (k, v))
    seen = np.zeros_like(q)
    for start, stop, live, live_stop in spans:
        for row in [*range(start, stop), *range(live, live_stop)]:
            keys = slice(start, min(row + 1, stop) if row < stop and row >= start else stop)
            scores = np.einsum("hd,thd->ht", q[row], k[keys])
            weighted = np.exp2(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
            total = weighted.sum(axis=1, keepdims=True)
            seen[row] = np.einsum("ht,thd->hd", weighted / np.where(total, total, 1), v[keys])
    return np.asarray(seen.reshape(len(x), -1) @ weights["o"].T.astype(np.float64))


def attention(
    library: ctypes.CDLL,
    x: Matrix,
    weights: dict[str, Matrix],
    norms: dict[str, Matrix],
    angles: Exact,
    dims: Dims,
    spans: Spans,
    bfloat16: bool,
) -> Matrix:
    """The library's."""
    qkv = laid_by(library, np.concatenate([weights[name] for name in "qkv"]), bfloat16)
    o = laid_by(library, weights["o"], bfloat16)
    rows = np.array(spans, np.int32)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    layer = Attention(
        qkv=qkv.ctypes.data,
        o=o.ctypes.data,
        norm=norms["before"].ctypes.data,
        q_norm=norms["q"].ctypes.data,
        k_norm=norms["k"].ctypes.data,
        epsilon=EPSILON,
        heads=dims.heads,
        kv_heads=dims.kv_heads,
        head_dim=dims.head_dim,
    )
    batch = Batch(
        spans=rows.ctypes.data,
        cos=cos.ctypes.data,
        sin=sin.ctypes.data,
        span_count=len(spans),
        real_rows=max(stop for _, stop, _, _ in spans),
    )
    return multiply(library, x, marked(library, layer, batch), D)


def largest_error(ours: Any, exact: Exact) -> float:
    """Relative to the size of each row."""
    size = np.linalg.norm(exact, axis=1) + 1e-30
    return float((np.linalg.norm(ours - exact, axis=1) / size).max())


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("spans", SPANS)
def test_attention(library: ctypes.CDLL, bfloat16: bool, dims: Dims, spans: Spans) -> None:
    tokens, d = max(max(span) for span in spans), dims.head_dim
    width, kv_width = dims.heads * d, dims.kv_heads * d
    x = numbers(tokens, D)
    shapes = {"q": (width, D), "k": (kv_width, D), "v": (kv_width, D), "o": (D, width)}
    weights = {name: numbers(*shape, bfloat16=bfloat16) for name, shape in shapes.items()}
    norms = {"before": numbers(D), "q": numbers(d) / np.float32(np.sqrt(d)), "k": numbers(d + 1)[:d]}
    angles = np.arange(tokens)[:, None] * 10.0 ** -np.linspace(0, 3, d // 2)

    ours = attention(library, x, weights, norms, angles, dims, spans, bfloat16)

    assert largest_error(ours, exact_attention(x, weights, norms, angles, dims, spans)) < CLOSE


def test_scores_beyond_the_range_of_float32s_exponent_are_weighed_exactly(library: ctypes.CDLL) -> None:
    x, angles = numbers(40, D), np.zeros((40, 4))
    weights = {name: numbers(8 + shift, D)[shift:] for shift, name in enumerate("qkv")} | {"o": numbers(D, 8)}
    norms = {"before": numbers(D), "q": np.full(8, 60, np.float32), "k": np.full(8, 60, np.float32)}

    ours = attention(library, x, weights, norms, angles, Dims(1, 1, 8), [(0, 40, 40, 40)], bfloat16=False)

    exact = exact_attention(x, weights, norms, angles, Dims(1, 1, 8), [(0, 40, 40, 40)])
    assert largest_error(ours, exact) < 1e-2  # a score of 28,800 is off by up to a thousandth


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800000], ids=["nan", "infinity"])
def test_a_row_that_is_no_number_spoils_no_other_prompt(library: ctypes.CDLL, bits: int) -> None:
    x, angles, dims = numbers(60, D), np.zeros((60, 4)), Dims(2, 1, 8)
    weights = {"q": numbers(16, D), "k": numbers(8, D), "v": numbers(9, D)[1:], "o": numbers(D, 16)}
    norms = {"before": numbers(D), "q": numbers(8), "k": numbers(9)[1:]}
    spans = [(0, 20, 50, 50), (20, 50, 50, 60)]
    whole = attention(library, x, weights, norms, angles, dims, spans, bfloat16=False)
    x.view(np.uint32)[7, 3] = bits

    ours = attention(library, x, weights, norms, angles, dims, spans, bfloat16=False)

    np.testing.assert_array_equal(ours[20:], whole[20:])
    assert np.isnan(ours[7:20]).all()


@pytest.mark.parametrize("size", [1.0, 1000.0], ids=["usual", "gates-beyond-the-range-of-exp"])
@pytest.mark.parametrize("tokens", [1, 17, 128, 129, 300])
def test_mlp(library: ctypes.CDLL, bfloat16: bool, tokens: int, size: float) -> None:
    inner = 50
    x, norm = numbers(tokens, D), numbers(D) * np.float32(size)
    gate, up = numbers(inner, D, bfloat16=bfloat16), numbers(inner + 1, D, bfloat16=bfloat16)[1:]
    down = numbers(D, inner, bfloat16=bfloat16)
    gate_up, panels = laid_by(library, np.concatenate([gate, up]), bfloat16), laid_by(library, down, bfloat16)
    layer = Mlp(gate_up=gate_up.ctypes.data, down=panels.ctypes.data, norm=norm.ctypes.data, epsilon=EPSILON)

    ours = multiply(library, x, marked(library, layer), D)

    h = rms_norm(x, norm)
    gates, ups = (h @ weight.T.astype(np.float64) for weight in (gate, up))
    with np.errstate(over="ignore"):
        exact = gates / (1 + np.exp(-gates)) * ups @ down.T.astype(np.float64)
    assert largest_error(ours, exact) < CLOSE
