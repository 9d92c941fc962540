"""The forward pass by compiled kernels gives what the plain one gives."""

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from encoder.checkpoint import load_weights, open_checkpoint
from encoder.options import ModelOptions
from encoder.qwen3.cpu.forward import CpuForward
from encoder.qwen3.cpu.kernels.library import Kernels
from encoder.qwen3.forward import choose_forward, cpu_kernels, widens_bfloat16
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import PlainForward
from encoder.types import Job, Tap
from tests.checkpoints import write_checkpoint

LAYERS = 4
TAPS = (Tap(0, False), Tap(2, False), Tap(LAYERS, False), Tap(LAYERS, True))
# Both round in float32, in another order; outliers a thousand times the median leave fewer bits for the rest.
CLOSE = 1e-5


def make_job(num_tokens: int, computed_rows: int | None = None, pad_position: int | None = None) -> Job:
    rows = num_tokens if computed_rows is None else computed_rows
    return Job(
        input_ids=tuple(np.random.default_rng(num_tokens).integers(0, 256, num_tokens).tolist()),
        computed_rows=rows,
        delivered_rows=rows,
        dropped_rows=0,
        taps=TAPS,
        combine="concat",
        dtype="float32",
        pad_position=pad_position,
        pad_token_id=200 + num_tokens % 50,  # each job of a batch pads with its own token
    )


BATCHES = [
    pytest.param([make_job(1)], id="one-token"),
    pytest.param([make_job(7)], id="odd-length"),
    pytest.param([make_job(300)], id="several-query-blocks"),
    pytest.param([make_job(5), make_job(40), make_job(129), make_job(5)], id="ragged"),
    pytest.param([make_job(9, computed_rows=64)], id="live-padding"),
    pytest.param([make_job(9, computed_rows=10, pad_position=1)], id="padding-at-one-position"),
    pytest.param([make_job(0), make_job(3)], id="an-empty-prompt"),
    pytest.param([make_job(0)], id="nothing-but-an-empty-prompt"),
    pytest.param([make_job(11, 32), make_job(20), make_job(6, 7, pad_position=1), make_job(0)], id="all-kinds"),
]

DIMS = [
    pytest.param({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}, id="grouped"),
    pytest.param({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}, id="ungrouped"),
    pytest.param({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}, id="odd-dims"),
    pytest.param({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}, id="one-stream"),
]


pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="no kernels were compiled for this CPU")


def load(folder: Path) -> Qwen3:
    checkpoint = open_checkpoint(ModelOptions(str(folder)))
    model = Qwen3(checkpoint.config)
    load_weights(checkpoint, model, mx.float32)
    return model


def fast(model: Qwen3, threads: int = 2) -> CpuForward:
    kernels = cpu_kernels()
    assert kernels is not None
    return CpuForward(model, kernels, threads)


def scale_rope(folder: Path) -> None:
    """By YaRN, with a factor on cosines and sines that is not 1."""
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    config["rope_parameters"] |= scaling
    (folder / "config.json").write_text(json.dumps(config))


def add_outliers(model: Qwen3) -> None:
    """Some channels a thousand times the others, as in real Qwen3."""
    channels = mx.ones(model.config.hidden_size)
    channels[mx.array([1, 5])] = 1000.0
    model.embed_tokens.weight = model.embed_tokens.weight * channels


def largest_error(ours: Sequence[mx.array], reference: mx.array, jobs: Sequence[Job]) -> float:
    """Relative to the size of each row."""
    errors = [0.0]
    for row, job in enumerate(jobs):
        expected = np.array(reference[row][: job.computed_rows], dtype=np.float64)
        difference = np.array(ours[row], dtype=np.float64) - expected
        size = np.linalg.norm(expected, axis=-1) + 1e-30
        errors.append(float((np.linalg.norm(difference, axis=-1) / size).max(initial=0.0)))
    return max(errors)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("jobs", BATCHES)
def test_rows_equal_those_of_the_padded_rectangle(tmp_path: Path, dims: dict[str, int], jobs: list[Job]) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48, **dims)
    plain = PlainForward(load(tmp_path))(jobs, TAPS)
    packed = fast(load(tmp_path))(jobs, TAPS)

    for tap in TAPS:
        assert [len(rows) for rows in packed[tap]] == [job.computed_rows for job in jobs]
        assert largest_error(packed[tap], plain[tap], jobs) < CLOSE


def test_scaled_rope_turns_rows_as_in_the_padded_rectangle(tmp_path: Path) -> None:
    """With other frequencies, and larger cosines and sines."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    jobs = [make_job(5), make_job(40), make_job(9, computed_rows=64, pad_position=1)]
    unscaled = fast(load(tmp_path))(jobs, TAPS)
    scale_rope(tmp_path)
    plain = PlainForward(load(tmp_path))(jobs, TAPS)
    packed = fast(load(tmp_path))(jobs, TAPS)

    for tap in TAPS:
        assert largest_error(packed[tap], plain[tap], jobs) < CLOSE
    assert largest_error(unscaled[TAPS[-1]], plain[TAPS[-1]], jobs) > 1e-3


def test_outlier_channels_leave_the_rest_exact(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    models = [load(tmp_path), load(tmp_path)]
    for model in models:
        add_outliers(model)
    jobs = [make_job(37), make_job(9, 64)]

    plain, packed = PlainForward(models[0])(jobs, TAPS), fast(models[1])(jobs, TAPS)

    assert all(largest_error(packed[tap], plain[tap], jobs) < CLOSE for tap in TAPS)


def test_scores_beyond_the_range_of_float32s_exponent_are_weighed_exactly(tmp_path: Path) -> None:
    """Large norms of q and k: only a row's own maximum keeps its weights finite."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    models = [load(tmp_path), load(tmp_path)]
    for model in models:
        attention = model.layers[1].self_attn
        attention.q_norm.weight, attention.k_norm.weight = attention.q_norm.weight * 8, attention.k_norm.weight * 8
    jobs = [make_job(37), make_job(200), make_job(9, 64), make_job(1)]

    plain, packed = PlainForward(models[0])(jobs, TAPS), fast(models[1])

    assert all(largest_error(packed(jobs, TAPS)[tap], plain[tap], jobs) < 1e-4 for tap in TAPS)


def test_bfloat16_weights_give_what_they_give_in_float32(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48, dtype="bfloat16")
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path)))
    model = Qwen3(checkpoint.config)
    load_weights(checkpoint, model, mx.float32, keep_bfloat16=widens_bfloat16(checkpoint.config))
    held = model.layers[0].mlp.up_proj.weight.dtype
    jobs = [make_job(37), make_job(200), make_job(9, 64), make_job(1)]

    plain, packed = PlainForward(load(tmp_path))(jobs, TAPS), choose_forward(model, mx.float32)

    assert held == mx.bfloat16 and isinstance(packed, CpuForward)
    assert all(largest_error(packed(jobs, TAPS)[tap], plain[tap], jobs) < CLOSE for tap in TAPS)


def test_a_model_with_biases_runs_plainly(tmp_path: Path) -> None:
    """The kernels do not know them."""
    write_checkpoint(tmp_path, attention_bias=True)

    assert isinstance(choose_forward(load(tmp_path), mx.float32), PlainForward)


def test_no_layer_runs_after_the_deepest_tap(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    forward = fast(load(tmp_path))

    forward([make_job(5)], [Tap(2, False)])

    assert forward.model.layers_run == 2


def test_only_what_is_asked_for_is_counted(tmp_path: Path) -> None:
    """Nothing is padded, so tokens that run are the tokens of the prompts."""
    write_checkpoint(tmp_path, num_hidden_layers=1)

    assert fast(load(tmp_path)).count_rows([5, 40, 129]) == 174
    assert PlainForward.count_rows(None, [5, 40, 129]) == 3 * 160  # type: ignore[arg-type]


def test_a_prompt_gives_the_same_bits_whatever_runs_beside_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    forward = fast(load(tmp_path))
    jobs = [make_job(37), make_job(9, 64), make_job(1), make_job(200)]
    together = forward(jobs, TAPS)

    for number, job in enumerate(jobs):
        alone = forward([job], TAPS)
        for tap in TAPS:
            np.testing.assert_array_equal(np.array(together[tap][number]), np.array(alone[tap][0]))


def test_rows_outlive_the_model_that_made_them(tmp_path: Path) -> None:
    """They are copies: the kernels' memory is used again."""
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    jobs = [make_job(37), make_job(9, 64)]
    plain, packed = PlainForward(load(tmp_path))(jobs, TAPS), fast(load(tmp_path))(jobs, TAPS)
    gc.collect()
    mx.clear_cache()

    assert all(largest_error(packed[tap], plain[tap], jobs) < CLOSE for tap in TAPS)


def test_batches_asked_for_before_the_first_is_read_are_each_their_own(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    batches = [[make_job(37)], [make_job(9, 64), make_job(5)], [make_job(200)]]
    plain, packed = PlainForward(load(tmp_path)), fast(load(tmp_path))

    rows = [packed(jobs, TAPS) for jobs in batches]

    for jobs, ours in zip(batches, rows, strict=True):
        theirs = plain(jobs, TAPS)
        assert all(largest_error(ours[tap], theirs[tap], jobs) < CLOSE for tap in TAPS)


def test_heads_larger_than_the_kernels_have_room_for_run_plainly(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=514)
    model = load(tmp_path)

    assert isinstance(choose_forward(model, mx.float32), PlainForward)
    assert not widens_bfloat16(model.config)


def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit."""
    monkeypatch.setattr("encoder.qwen3.cpu.forward.THREAD_WORK", 1)
    write_checkpoint(tmp_path, num_hidden_layers=LAYERS, hidden_size=24, intermediate_size=48)
    jobs = [make_job(37), make_job(9, 64), make_job(1), make_job(200)]
    alone, together = fast(load(tmp_path), threads=1)(jobs, TAPS), fast(load(tmp_path), threads=5)(jobs, TAPS)

    for tap in TAPS:
        for one, five in zip(alone[tap], together[tap], strict=True):
            np.testing.assert_array_equal(np.array(one), np.array(five))


@pytest.mark.parametrize(("tokens", "threads"), [(1, 1), (200, 2), (500, 5), (2000, 8)])
def test_a_pass_has_as_many_threads_as_are_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, threads: int
) -> None:
    """Threads that have little to do only wait for each other."""
    write_checkpoint(tmp_path, num_hidden_layers=1, hidden_size=24, intermediate_size=48)  # 5,760 numbers in a layer
    forward = fast(load(tmp_path), threads=8)
    monkeypatch.setattr("encoder.qwen3.cpu.forward.THREAD_WORK", 100 * 5760)
    used: list[int] = []
    monkeypatch.setattr(Kernels, "run_layers", lambda *arguments: used.append(arguments[-1]))

    forward([make_job(tokens)], [Tap(1, False)])

    assert used == [threads]


def test_jobs_keep_their_order(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=2, hidden_size=24, intermediate_size=48)
    forward, tap = fast(load(tmp_path)), Tap(0, False)
    jobs = [make_job(3), replace(make_job(5), computed_rows=9), make_job(2)]

    for rows, job in zip(forward(jobs, [tap])[tap], jobs, strict=True):
        [alone] = forward([job], [tap])[tap]
        np.testing.assert_array_equal(np.array(rows), np.array(alone))


def test_a_layer_with_matrices_of_several_dtypes_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=2, hidden_size=24, intermediate_size=48)
    model = load(tmp_path)
    projection = model.layers[1].mlp.down_proj
    projection.weight = projection.weight.astype(mx.bfloat16)

    with pytest.raises(ValueError, match="expected one dtype in all"):
        fast(model)
