"""A forward pass serves only where it gives what the plain one gives."""

import logging
from collections.abc import Iterator, Sequence

import mlx.core as mx
import pytest

from encoder.qwen3 import forward
from encoder.qwen3.cpu.kernels.library import Kernels
from encoder.qwen3.forward import choose_forward, cpu_kernels
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import PlainForward
from encoder.qwen3.proof import CONFIG, largest_error
from encoder.types import Job, Rows, Tap

needs_kernels = pytest.mark.skipif(cpu_kernels() is None, reason="no kernels were compiled for this CPU")


@pytest.fixture
def cleared_cache() -> Iterator[None]:
    """Clears what `cpu_kernels` caches for the process, before the test and after it."""
    cpu_kernels.cache_clear()
    yield
    cpu_kernels.cache_clear()


class Shifted(PlainForward):
    """A pass that is a little off in one number."""

    shift = 3e-5

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> dict[Tap, Rows]:  # type: ignore[override]
        rows = dict(super().__call__(jobs, taps))
        last = rows[taps[-1]]
        assert isinstance(last, mx.array)
        peak = mx.abs(last[1, 30]).max()
        last[1, 30, 7] += self.shift * peak
        return rows


def test_the_plain_pass_agrees_with_itself() -> None:
    assert largest_error(PlainForward, mx.float32) == 0


def test_one_number_that_is_off_in_a_live_padding_row_is_found() -> None:
    assert 2e-5 < largest_error(Shifted, mx.float32) < 4e-5


@needs_kernels
def test_kernels_that_differ_from_the_plain_pass_are_not_used(
    cleared_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A compiler's bug, or a CPU that does not do what it says: the plain pass serves, and the log says why."""
    run_layers = Kernels.run_layers

    def wrong(self: Kernels, dims: object, layers: object, count: int, batch: object, x: object, threads: int) -> None:
        run_layers(self, dims, layers, count, batch, x, threads)  # type: ignore[arg-type]
        x[0, 0] += 1e-3  # type: ignore[index]

    monkeypatch.setattr(Kernels, "run_layers", wrong)

    with caplog.at_level(logging.ERROR):
        chosen = choose_forward(Qwen3(CONFIG), mx.float32)

    assert isinstance(chosen, PlainForward)
    assert "differ from the reference" in caplog.text


def test_without_compiled_kernels_the_plain_pass_serves_and_says_so(
    cleared_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(forward, "load_kernels", lambda: None)

    with caplog.at_level(logging.WARNING):
        chosen = choose_forward(Qwen3(CONFIG), mx.float32)

    assert isinstance(chosen, PlainForward)
    assert "no compiled kernels" in caplog.text
