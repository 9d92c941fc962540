"""The fused forward pass for CUDA GPUs gives what the plain one gives.

Its arithmetic runs on any device in MLX's own operations; what needs the kernels themselves needs a GPU.
"""

import gc
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from encoder.checkpoint import load_weights, open_checkpoint
from encoder.options import ModelOptions
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.cuda import kernels as cuda_kernels
from encoder.qwen3.cuda.forward import (
    LAYERS_AT_ONCE,
    MAX_HANDED_OVER,
    MAX_ROWS_AHEAD,
    FusedForward,
)
from encoder.qwen3.cuda.kernels import DTYPE, QUERY_BLOCK_ROWS, CudaKernels, MlxKernels, build_kernels
from encoder.qwen3.cuda.pack import pack_and_fill, round_rows
from encoder.qwen3.forward import OverlappingForward, choose_forward
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import PlainForward
from encoder.types import Job, Tap
from tests.checkpoints import write_checkpoint
from tests.encoder.qwen3.cpu.test_forward import (
    BATCHES,
    CLOSE,
    LAYERS,
    TAPS,
    add_outliers,
    largest_error,
    make_job,
    scale_rope,
)

HAS_GPU = mx.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
DIMS = [
    pytest.param({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}, id="grouped"),
    pytest.param({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 128}, id="ungrouped"),
    pytest.param({"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 64}, id="one-key-head"),
]
ALL_KINDS = [make_job(5), make_job(300), make_job(11, 96), make_job(6, 7, pad_position=1), make_job(0), make_job(64)]


def load(folder: Path, dtype: mx.Dtype, outliers: bool = False) -> Qwen3:
    checkpoint = open_checkpoint(ModelOptions(str(folder)))
    model = Qwen3(checkpoint.config)
    load_weights(checkpoint, model, dtype)
    if outliers:
        add_outliers(model)
        model.embed_tokens.weight = model.embed_tokens.weight.astype(dtype)
    return model


def widen(rows: Sequence[mx.array] | mx.array) -> list[mx.array]:
    return [x.astype(mx.float32) for x in rows]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("jobs", BATCHES)
def test_fused_rows_equal_those_of_the_padded_rectangle(tmp_path: Path, dims: dict[str, int], jobs: list[Job]) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48, **dims)
    plain = PlainForward(load(tmp_path, mx.float32))(jobs, TAPS)
    model = load(tmp_path, mx.float32)
    fused = FusedForward(model, MlxKernels(model.config))(jobs, TAPS)

    for tap in TAPS:
        assert [len(rows) for rows in fused[tap]] == [job.computed_rows for job in jobs]
        assert largest_error(fused[tap], plain[tap], jobs) < CLOSE


def test_scaled_rope_turns_rows_as_in_the_padded_rectangle(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    scale_rope(tmp_path)
    plain = PlainForward(load(tmp_path, mx.float32))(ALL_KINDS, TAPS)
    model = load(tmp_path, mx.float32)
    fused = FusedForward(model, MlxKernels(model.config))(ALL_KINDS, TAPS)

    assert all(largest_error(fused[tap], plain[tap], ALL_KINDS) < CLOSE for tap in TAPS)


def test_outlier_channels_leave_the_rest_exact(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    plain_model, model = load(tmp_path, mx.float32, outliers=True), load(tmp_path, mx.float32, outliers=True)

    plain = PlainForward(plain_model)(ALL_KINDS, TAPS)
    fused = FusedForward(model, MlxKernels(model.config))(ALL_KINDS, TAPS)

    assert all(largest_error(fused[tap], plain[tap], ALL_KINDS) < CLOSE for tap in TAPS)


def test_every_row_is_in_one_query_block_and_sees_its_own_prompt_alone() -> None:
    packed = pack_and_fill(ALL_KINDS)
    blocks = np.array(packed.query_blocks).tolist()

    assert [row for first, rows, *_ in blocks for row in range(first, first + rows)] == list(
        range(len(packed.input_ids))
    )
    assert len(packed.input_ids) == round_rows(len(packed.input_ids))
    for first, rows, first_key, keys, position in blocks:
        jobs = [job for job, span in zip(ALL_KINDS, packed.spans, strict=True) if span.start <= first < span.stop]
        assert (0 < rows <= QUERY_BLOCK_ROWS and first - position == first_key) or not jobs or not rows
        assert keys == sum(len(job.input_ids) for job in jobs if rows)  # filling rows see nothing


def test_batches_have_few_numbers_of_query_blocks() -> None:
    """Each is a shape of its own, for which MLX traces a layer."""
    numbers = {len(pack_and_fill([make_job(5)] * prompts).query_blocks) for prompts in range(1, 100)}

    assert numbers <= {*range(1, 9), *range(16, 105, 8)}


class Traced(MlxKernels):
    """Attention without a mask, which mx.compile can trace, and a count of how often a layer is described."""

    def __init__(self, config: Qwen3Config, traceable: bool) -> None:
        super().__init__(config)
        self.traceable = traceable
        self.described = 0

    def attend(self, qkv: mx.array, query_blocks: mx.array) -> mx.array:
        self.described += 1
        return qkv[:, : self.config.num_attention_heads * self.config.head_dim] + query_blocks.sum()


def test_a_layer_is_traced_once_for_each_shape_and_gives_the_same(tmp_path: Path) -> None:
    """Describing a pass takes the host about as long as computing a short prompt takes the GPU."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    batches = [[make_job(5)], [make_job(6)], [make_job(100)], [make_job(5)]]
    results, described = [], []
    for traceable in (True, False):
        model = load(tmp_path, mx.float32)
        kernels = Traced(model.config, traceable)
        fused = FusedForward(model, kernels)
        results.append([fused(jobs, TAPS) for jobs in batches])
        described.append(kernels.described)

    assert described == [2, LAYERS * len(batches)]
    for traced, plain in zip(*results, strict=True):
        for tap in TAPS:
            for rows, others in zip(traced[tap], plain[tap], strict=True):
                np.testing.assert_allclose(np.array(rows), np.array(others), rtol=1e-5, atol=1e-5)


def test_a_pass_that_nobody_holds_frees_its_weights_at_once(tmp_path: Path) -> None:
    """A service replaces a broken model only then, and the garbage collector never frees what it has frozen."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    fused = FusedForward(model, Traced(model.config, traceable=True))
    mx.eval(list(fused([make_job(5)], TAPS).values()))
    gone = weakref.ref(fused)
    gc.disable()
    del fused
    gc.enable()

    assert gone() is None


def test_few_sizes_hold_any_number_of_rows_with_little_filling() -> None:
    """The first product of each size is slow, and filler rows are computed for nothing."""
    sizes = {rows: round_rows(rows) for rows in range(8193)}

    assert all(rows <= size <= max(16, rows + 15, 1.0625 * rows) for rows, size in sizes.items())
    assert all(round_rows(size) == size and size % 16 == 0 for size in sizes.values())
    assert len({size for size in sizes.values() if size <= 4096}) == 80


@pytest.mark.parametrize(("max_rows", "largest"), [(4096, 4096), (1000, 1024), (100_000, 4096), (100, 512)])
def test_every_size_up_to_a_large_batch_runs_before_the_first_request(
    tmp_path: Path, max_rows: int, largest: int
) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    forward = FusedForward(model, MlxKernels(model.config))

    sizes = forward.warmup_sizes(max_rows)
    assert {forward.count_rows([rows]) for rows in range(1, largest + 1)} == set(sizes)
    assert max(sizes) == largest


def test_layers_are_taken_over_one_by_one_and_counted_when_they_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    fused = FusedForward(model, MlxKernels(model.config))
    fused.layers[2:] = []

    fused([make_job(5)], [Tap(2, False), Tap(0, False)])

    assert model.layers == [] and model.layers_run == 2


@pytest.mark.parametrize(("layers", "begun"), [(3, 2), (1, 1), (0, 0)])
def test_a_pass_begins_with_some_layers_and_finishes_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, begun: int
) -> None:
    """The GPU computes the first layers while the host takes the results of another batch."""
    monkeypatch.setattr("encoder.qwen3.cuda.forward.LAYERS_BEGUN", 2)
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    forward = FusedForward(model, MlxKernels(model.config))
    jobs, taps = [make_job(5)], [Tap(layers, normed=False)]
    whole = forward(jobs, taps)
    before = model.layers_run
    forward_pass = forward.begin(jobs, taps)

    assert isinstance(forward, OverlappingForward)
    assert model.layers_run - before == begun
    np.testing.assert_array_equal(np.array(forward_pass.finish()[taps[0]][0]), np.array(whole[taps[0]][0]))
    assert model.layers_run - before == layers


def test_passes_that_overlap_do_not_change_each_other(tmp_path: Path) -> None:
    """As the batch loop does it: begin the next, collect the one before, finish the next."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    forward = FusedForward(model, MlxKernels(model.config))
    batches = [[make_job(5), make_job(7)], [make_job(40)]]
    expected = [forward(jobs, TAPS) for jobs in batches]
    begun = [forward.begin(jobs, TAPS) for jobs in batches]

    for forward_pass, rows in zip(begun, expected, strict=True):
        finished = forward_pass.finish()
        for tap in TAPS:
            for one, other in zip(finished[tap], rows[tap], strict=True):
                np.testing.assert_array_equal(np.array(one), np.array(other))


def test_a_batch_of_many_rows_waits_for_the_gpu_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may be only so far ahead, here two layers, of this pass and the one before: what runs holds memory."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    fused = FusedForward(model, MlxKernels(model.config))
    expected = fused(ALL_KINDS, TAPS)
    waits: list[object] = []

    monkeypatch.setattr("encoder.qwen3.cuda.forward.LAYERS_AT_ONCE", 1)
    monkeypatch.setattr("encoder.qwen3.cuda.forward.MAX_ROWS_AHEAD", 2 * len(pack_and_fill(ALL_KINDS).input_ids))
    monkeypatch.setattr(mx, "eval", waits.append)
    waited = fused(ALL_KINDS, TAPS)

    assert len(waits) == 1 + LAYERS - 2  # what the pass before has handed over last counts, too
    for tap in TAPS:
        for rows, others in zip(waited[tap], expected[tap], strict=True):
            np.testing.assert_array_equal(np.array(rows), np.array(others))


def test_the_host_remembers_few_of_many_small_passes(tmp_path: Path) -> None:
    """It looks at all of them at each hand-over, and each holds memory."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS)
    model = load(tmp_path, mx.float32)
    fused = FusedForward(model, MlxKernels(model.config))
    for _ in range(20):
        fused([make_job(5)], TAPS)

    assert len(fused.handed_over) == MAX_HANDED_OVER
    assert LAYERS_AT_ONCE * MAX_HANDED_OVER * 256 >= MAX_ROWS_AHEAD  # larger passes are waited for earlier


@pytest.mark.skipif(HAS_GPU, reason="what a CPU runs")
def test_a_cpu_does_not_run_the_fused_pass(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, head_dim=64)

    assert not isinstance(choose_forward(load(tmp_path, DTYPE), DTYPE), FusedForward)


def test_without_a_compiler_for_kernels_the_plain_pass_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NVRTC needs CUDA's headers; who has none gets slower replies and not an error."""

    class Broken(MlxKernels):
        qkv_width = 4 * 64

        def attend(self, qkv: mx.array, query_blocks: mx.array) -> mx.array:
            raise RuntimeError("Can not find locations of CUDA headers")

    write_checkpoint(tmp_path, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    monkeypatch.setattr(cuda_kernels, "CudaKernels", Broken)
    model = load(tmp_path, DTYPE)

    with caplog.at_level(logging.WARNING):
        assert build_kernels(model.config) is None
    assert "CUDA headers" in caplog.text
    if HAS_GPU:
        assert isinstance(choose_forward(model, DTYPE), PlainForward)


@pytest.mark.parametrize(
    "dims",
    [
        pytest.param({"head_dim": 32}, id="head_dim"),
        pytest.param({"head_dim": 64, "hidden_size": 20}, id="hidden_size"),
        pytest.param({"head_dim": 64, "intermediate_size": 36}, id="intermediate_size"),
    ],
)
def test_there_are_no_kernels_for_unsupported_dims(dims: dict[str, int]) -> None:
    config = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 64} | dims

    assert (
        build_kernels(
            Qwen3Config(
                **config,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=8,
                rms_norm_eps=1e-6,
                rope_theta=1e6,
                max_position_embeddings=64,
            )
        )
        is None
    )


@needs_gpu
@pytest.mark.parametrize("dims", DIMS)
def test_kernels_round_once(tmp_path: Path, dims: dict[str, int]) -> None:
    """Each is as far from float32 as one rounding to bfloat16, and for attention the weights' rounding too."""
    write_checkpoint(tmp_path, hidden_size=136, intermediate_size=264, **dims)
    config = open_checkpoint(ModelOptions(str(tmp_path))).config
    kernels, exact = CudaKernels(config), MlxKernels(config)
    packed = pack_and_fill(ALL_KINDS)
    rows = len(packed.input_ids)
    x, qkv, gate_up = (
        (mx.random.normal((rows, width)) * 30).astype(DTYPE) for width in (136, kernels.qkv_width, 2 * 264)
    )
    norms = [(1 + mx.random.normal((config.head_dim,)) / 5).astype(DTYPE) for _ in "qk"]
    cos_sin = mx.random.normal((rows, config.head_dim))

    heads = kernels.finish_heads(x, qkv, *norms, cos_sin)
    pairs = {
        "heads": (heads, exact.finish_heads(*widen([x, qkv, *norms]), cos_sin)),
        "attend": (kernels.attend(heads, packed.query_blocks), exact.attend(*widen([heads]), packed.query_blocks)),
        "swiglu": (kernels.swiglu(x, gate_up), exact.swiglu(*widen([x, gate_up]))),
    }

    for name, (found, expected) in pairs.items():
        difference = np.array(found.astype(mx.float32) - expected, np.float64)
        assert np.linalg.norm(difference) < 3e-3 * np.linalg.norm(np.array(expected)), name


@needs_gpu
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dims", DIMS)
def test_on_a_gpu_the_fused_pass_is_no_further_from_float32_than_the_plain_one(
    tmp_path: Path, dims: dict[str, int], outliers: bool
) -> None:
    write_checkpoint(
        tmp_path, num_hidden_layers=LAYERS, hidden_size=256, intermediate_size=512, dtype="bfloat16", **dims
    )
    exact = PlainForward(load(tmp_path, mx.float32, outliers))(ALL_KINDS, TAPS)
    plain = PlainForward(load(tmp_path, DTYPE, outliers))(ALL_KINDS, TAPS)
    forward = choose_forward(load(tmp_path, DTYPE, outliers), DTYPE)
    fused = forward(ALL_KINDS, TAPS)

    assert isinstance(forward, FusedForward)
    for tap in TAPS:
        own = [rows[: job.computed_rows] for rows, job in zip(plain[tap], ALL_KINDS, strict=True)]
        plain_error = largest_error(widen(own), exact[tap], ALL_KINDS)
        assert largest_error(widen(fused[tap]), exact[tap], ALL_KINDS) <= 1.1 * plain_error


@needs_gpu
def test_on_a_gpu_neighbours_in_a_batch_change_no_more_than_rounding_does(tmp_path: Path) -> None:
    """A product of other row counts may add up in another order."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=256, intermediate_size=512, head_dim=64)
    forward, tap = choose_forward(load(tmp_path, DTYPE), DTYPE), Tap(LAYERS, True)
    together = forward(ALL_KINDS, [tap])[tap]

    for rows, job in zip(together, ALL_KINDS, strict=True):
        [alone] = forward([job], [tap])[tap]
        assert largest_error(widen([rows]), widen([alone])[0][None], [job]) < 2e-2
