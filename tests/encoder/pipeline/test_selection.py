"""Rows of one batch to the embeds of each job, on hidden states whose numbers say where they come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from encoder import Preset, PromptEmbeds, TextEncoder
from encoder.errors import EncoderError, InvalidField, ModelFailure
from encoder.options import ModelOptions
from encoder.pipeline.finite import is_finite
from encoder.pipeline.selection import export, select
from encoder.qwen3.cuda.to_host import HostCopy
from encoder.types import LARGE_BYTES, Combine, Job, Rows, Tap
from tests.checkpoints import write_checkpoint

FIRST, SECOND = Tap(1, normed=False), Tap(2, normed=True)


def make_job(num_tokens: int, **fields: Any) -> Job:
    """Real rows alone, of the first tap, unless said otherwise."""
    job = Job(
        input_ids=tuple(range(num_tokens)),
        computed_rows=num_tokens,
        delivered_rows=num_tokens,
        dropped_rows=0,
        taps=(FIRST,),
        combine="concat",
        dtype="float32",
    )
    return replace(job, **fields)


def numbered(length: int, batch: int = 1) -> dict[Tap, mx.array]:
    """(B, L, 2) for two taps. A number's digits are tap, place in the batch, row and feature: 1020.1."""
    place, row, feature = np.meshgrid(np.arange(batch), np.arange(length), np.arange(2), indexing="ij")
    x = (100 * place + row + feature / 10).astype(np.float32)
    return {FIRST: mx.array(1000 + x), SECOND: mx.array(2000 + x)}


def selected(
    hidden_states: Mapping[Tap, Rows], jobs: Sequence[Job], grouped: bool | None = None
) -> list[PromptEmbeds | EncoderError]:
    return export(select(hidden_states, jobs, grouped))


def one(job: Job, length: int = 4) -> PromptEmbeds:
    [result] = selected(numbered(length), [job])
    assert isinstance(result, PromptEmbeds)
    return result


def rows_of(embeds: PromptEmbeds) -> list[float]:
    """The first feature of each row."""
    return np.asarray(embeds.hidden_states[:, 0], dtype=np.float64).tolist()


def test_each_job_gets_its_own_rows_taps_and_order() -> None:
    """Neighbours in a batch want different things."""
    jobs = [make_job(2, taps=(SECOND, FIRST)), make_job(3, dropped_rows=1)]
    both, dropped = selected(numbered(4, batch=2), jobs)

    assert isinstance(both, PromptEmbeds) and isinstance(dropped, PromptEmbeds)
    np.testing.assert_allclose(both.hidden_states, [[2000, 2000.1, 1000, 1000.1], [2001, 2001.1, 1001, 1001.1]])
    assert rows_of(dropped) == [1101, 1102]


def test_jobs_of_one_batch_may_want_different_dtypes() -> None:
    jobs = [make_job(2, dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    singles, brains, halves = selected({FIRST: mx.array(np.tile([[1.5, -2.0]], (3, 2, 1)))}, jobs)

    assert isinstance(singles, PromptEmbeds) and isinstance(brains, PromptEmbeds) and isinstance(halves, PromptEmbeds)
    assert singles.hidden_states.dtype == np.float32
    assert halves.hidden_states.dtype == np.float16
    assert singles.hidden_states.tolist() == halves.hidden_states.tolist() == [[1.5, -2.0]] * 2
    assert brains.hidden_states.tolist() == [[0x3FC0, 0xC000]] * 2


def memory_of(embeds: PromptEmbeds) -> int:
    """Bytes of the memory that this result keeps alive."""
    memory: Any = embeds.hidden_states
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    return int(memory.nbytes)


def numbers(job: Job) -> dict[Tap, list[mx.array]]:
    """Of one job, all different."""
    rows = np.arange(job.computed_rows * 256, dtype=np.float32).reshape(-1, 256)
    return {FIRST: [mx.array(rows)]}


LARGE = LARGE_BYTES // 1024  # rows of 256 numbers in float32


@pytest.mark.parametrize("grouped", [True, False])
def test_a_detached_result_is_equal_and_has_memory_of_its_own(grouped: bool) -> None:
    """The cache counts the bytes of each result, so a cached one must not keep the memory of others."""
    jobs = [make_job(rows, dtype=dtype) for rows, dtype in ((2, "float32"), (0, "float32"), (5, "float16"))]
    states = {FIRST: [numbers(job)[FIRST][0] for job in jobs]}

    for embeds, rows, job in zip(selected(states, jobs, grouped), states[FIRST], jobs, strict=True):
        assert isinstance(embeds, PromptEmbeds)
        own = embeds.detach()
        expected = np.array(rows.astype(getattr(mx, job.dtype)))
        for result in (embeds, own):
            np.testing.assert_array_equal(result.hidden_states, expected)
            assert result.hidden_states.dtype == job.dtype
            assert not result.hidden_states.flags.writeable
        assert own.attention_mask is embeds.attention_mask
        assert memory_of(own) == own.hidden_states.nbytes
        assert not own.shares_memory


@pytest.mark.parametrize("grouped", [True, False])
def test_all_operations_of_a_batch_are_described_before_its_results_are_exported(grouped: bool) -> None:
    """An operation described by `export` would be computed after the batch that has begun by then."""
    jobs = [make_job(2), make_job(3, dtype="bfloat16")]
    selection = select({FIRST: [numbers(job)[FIRST][0] for job in jobs]}, jobs, grouped)

    assert [copy.done.dtype for copy in selection.copies] == [mx.uint8, mx.uint8]


def test_small_results_of_a_batch_share_memory_and_large_ones_are_copied() -> None:
    jobs = [make_job(2), make_job(3), make_job(LARGE)]
    small, other, large = selected({FIRST: [numbers(job)[FIRST][0] for job in jobs]}, jobs, grouped=True)

    assert isinstance(small, PromptEmbeds) and isinstance(other, PromptEmbeds) and isinstance(large, PromptEmbeds)
    assert (small.shares_memory, other.shares_memory, large.shares_memory) == (True, True, False)
    assert np.shares_memory(small.detach().hidden_states, small.hidden_states) is False
    assert memory_of(large) == large.hidden_states.nbytes


def test_results_that_a_gpu_copied_to_the_host_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones neither: replies send that memory, and `detach` copies it for the cache."""
    hosts: list[np.ndarray[Any, Any]] = []

    def copy_to_host(x: mx.array) -> HostCopy:
        hosts.append(np.array(x))
        return HostCopy(x, hosts[-1])

    monkeypatch.setattr("encoder.pipeline.selection.copy_to_host", copy_to_host)
    jobs = [make_job(2), make_job(3, dtype="float16"), make_job(LARGE)]
    states = [numbers(job)[FIRST][0] for job in jobs]

    for embeds, rows, job in zip(selected({FIRST: states}, jobs, grouped=True), states, jobs, strict=True):
        assert isinstance(embeds, PromptEmbeds)
        assert any(np.shares_memory(embeds.hidden_states, host) for host in hosts)
        assert embeds.shares_memory
        np.testing.assert_array_equal(embeds.hidden_states, np.array(rows.astype(getattr(mx, job.dtype))))
    assert len(hosts) == 2  # one for each dtype


@pytest.mark.parametrize("grouped", [True, False])
def test_a_result_that_shares_memory_with_no_other_is_not_copied_again(grouped: bool) -> None:
    [alone] = selected(numbers(make_job(2)), [make_job(2)], grouped)

    assert isinstance(alone, PromptEmbeds)
    assert alone.detach() is alone


def test_rows_may_come_without_a_rectangle() -> None:
    """A packed forward pass hands out each job's rows by themselves."""
    rectangle = numbered(4, batch=2)
    jobs = [make_job(2), make_job(4)]
    packed = selected({tap: [x[0, :2], x[1]] for tap, x in rectangle.items()}, jobs)

    for ours, expected in zip(packed, selected(rectangle, jobs), strict=True):
        assert isinstance(ours, PromptEmbeds) and isinstance(expected, PromptEmbeds)
        np.testing.assert_array_equal(ours.hidden_states, expected.hidden_states)


@pytest.mark.parametrize(
    ("combine", "expected", "rows_axis"),
    [
        pytest.param("concat", [[1000, 1000.1, 2000, 2000.1], [1001, 1001.1, 2001, 2001.1]], 0, id="concat"),
        pytest.param("interleave", [[1000, 2000, 1000.1, 2000.1], [1001, 2001, 1001.1, 2001.1]], 0, id="interleave"),
        pytest.param("stack", [[[1000, 1000.1], [1001, 1001.1]], [[2000, 2000.1], [2001, 2001.1]]], 1, id="stack"),
        pytest.param(
            "stack_rows", [[[1000, 1000.1], [2000, 2000.1]], [[1001, 1001.1], [2001, 2001.1]]], 0, id="stack_rows"
        ),
    ],
)
def test_several_hidden_states_become_one(combine: Combine, expected: Any, rows_axis: int) -> None:
    """FLUX.2, Ideogram 4, Fibo and Krea 2, in this order."""
    embeds = one(make_job(2, taps=(FIRST, SECOND), combine=combine))

    np.testing.assert_allclose(embeds.hidden_states, np.array(expected, np.float32))
    assert embeds.rows_axis == rows_axis
    assert embeds.hidden_states.shape[embeds.rows_axis] == len(embeds.attention_mask) == 2


def test_a_bundle_joins_features_before_the_stack() -> None:
    """A hidden state may be in several bundles."""
    embeds = one(make_job(1, taps=(FIRST, SECOND, SECOND, FIRST), combine="stack", bundle=2))

    np.testing.assert_allclose(embeds.hidden_states, [[[1000, 1000.1, 2000, 2000.1]], [[2000, 2000.1, 1000, 1000.1]]])


def test_unit_rms_scales_each_row_of_each_hidden_state() -> None:
    """Before bundles and stacks, so that each has a share alike."""
    embeds = one(make_job(2, taps=(FIRST, SECOND), unit_rms=True))
    for features in (embeds.hidden_states[:, :2], embeds.hidden_states[:, 2:]):
        np.testing.assert_allclose((features.astype(np.float64) ** 2).mean(axis=-1), 1, rtol=1e-6)

    np.testing.assert_allclose(embeds.hidden_states[0, 1] / embeds.hidden_states[0, 0], 1000.1 / 1000, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "rows", "mask"),
    [
        pytest.param({}, [1000, 1001, 1002], "111", id="cut"),
        pytest.param({"delivered_rows": 5}, [1000, 1001, 1002, 0, 0], "11100", id="zero"),
        pytest.param({"computed_rows": 4, "delivered_rows": 4}, [1000, 1001, 1002, 1003], "1110", id="live"),
        pytest.param(
            {"computed_rows": 4, "delivered_rows": 6, "pad_position": 1},
            [1000, 1001, 1002, 1003, 1003, 1003],
            "111000",
            id="live, one for all",
        ),
        pytest.param({"delivered_rows": 5, "tail_rows": 1}, [1000, 1001, 0, 0, 1002], "11001", id="tail"),
        pytest.param({"tail_rows": 1}, [1000, 1001, 1002], "111", id="tail, nothing padded"),
        pytest.param(
            {"delivered_rows": 5, "tail_rows": 1, "dropped_rows": 1}, [1001, 0, 0, 1002], "1001", id="dropped"
        ),
        pytest.param({"dropped_rows": 3}, [], "", id="all dropped"),
    ],
)
def test_padding_rows_and_the_mask(fields: dict[str, Any], rows: list[float], mask: str) -> None:
    """The mask is True at the rows of real tokens, wherever they stand."""
    embeds = one(make_job(3, **fields))

    assert rows_of(embeds) == rows
    assert embeds.attention_mask.tolist() == [digit == "1" for digit in mask]


def test_padding_is_placed_in_each_hidden_state_before_they_are_stacked() -> None:
    """Krea 2: (rows, n, D), zeros in the middle of every one."""
    embeds = one(make_job(3, delivered_rows=4, tail_rows=1, taps=(FIRST, SECOND), combine="stack_rows"))

    np.testing.assert_allclose(embeds.hidden_states[..., 0], [[1000, 2000], [1001, 2001], [0, 0], [1002, 2002]])


@pytest.mark.parametrize("delivered", [1, 3])
def test_a_prompt_without_tokens_is_padding_alone(delivered: int) -> None:
    """PRX and Anima encode an empty prompt without a template."""
    embeds = one(make_job(0, delivered_rows=delivered))

    assert rows_of(embeds) == [0] * delivered
    assert not embeds.attention_mask.any()


@pytest.mark.parametrize("combine", ["concat", "interleave", "stack", "stack_rows"])
def test_a_prompt_without_tokens_may_give_no_row_at_all(combine: Combine) -> None:
    """Where padding is cut, as for a bare prompt."""
    embeds = one(make_job(0, taps=(FIRST, SECOND), combine=combine))

    assert embeds.hidden_states.size == 0
    assert embeds.hidden_states.shape[embeds.rows_axis] == len(embeds.attention_mask) == 0


def test_bfloat16_travels_as_its_bits() -> None:
    """NumPy has no bfloat16; a scaled hidden state is scaled in float32 all the same."""
    embeds = one(make_job(1, dtype="bfloat16", unit_rms=True))
    floats = (embeds.hidden_states.astype(np.uint32) << 16).view(np.float32)

    assert embeds.hidden_states.dtype == np.uint16
    np.testing.assert_allclose(floats, [[1, 1]], rtol=2**-8)


@pytest.mark.parametrize(
    ("number", "dtype", "error"),
    [(1e30, "float16", InvalidField), (float("nan"), "float32", ModelFailure), (float("inf"), "float32", ModelFailure)],
)
def test_numbers_that_are_not_finite_fail_their_own_job_alone(
    number: float, dtype: Any, error: type[EncoderError]
) -> None:
    """A neighbour in the batch has done nothing."""
    states = {FIRST: mx.array([[[1.0, 2.0]], [[1.0, number]]])}
    well, ill = selected(states, [make_job(1, dtype=dtype), make_job(1, dtype=dtype)])

    assert isinstance(well, PromptEmbeds)
    assert isinstance(ill, error)


@pytest.mark.parametrize("grouped", [True, False])
def test_only_a_result_that_is_not_finite_does_not_leave_mlx(grouped: bool) -> None:
    """Whether they are checked together or one by one."""
    rows = [[1.0, 2.0], [1.0, float("nan")], [3.0], [float("inf")], [4.0]]
    jobs = [make_job(1, dtype=dtype) for dtype in ("float32", "float32", "float16", "float32", "float16")]
    outcomes = selected({FIRST: [mx.array([row]) for row in rows]}, jobs, grouped)

    found = [outcome.hidden_states.tolist() if isinstance(outcome, PromptEmbeds) else None for outcome in outcomes]
    assert found == [[[1.0, 2.0]], None, [[3.0]], None, [[4.0]]]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_is_finite_agrees_with_mlx_on_sixteen_bits(dtype: mx.Dtype) -> None:
    """On patterns from the whole range and around infinity, each by itself."""
    every = mx.arange(2**16).astype(mx.uint16).view(dtype)

    assert [is_finite(x).item() for x in every[::37]] == mx.isfinite(every[::37]).tolist()
    for x in every[mx.array([0x7F7F, 0x7F80, 0x7F81, 0xFF80, 0x7BFF, 0x7C00, 0x7C01, 0xFC00])]:
        assert is_finite(x).item() == mx.isfinite(x).item()


@pytest.mark.parametrize("number", ["3.4e38", "-3.4e38", "inf", "-inf", "nan", "-nan", "0", "1e-45"])
def test_is_finite_agrees_with_numpy_on_float32(number: str) -> None:
    """With the number between two ordinary ones."""
    x = np.array([1, float(number), -1], np.float32)

    assert is_finite(mx.array(x)).item() == np.isfinite(x).all()


def test_a_result_cannot_be_written_to() -> None:
    """The cache and the replies that are being sent share its memory."""
    embeds = one(make_job(2))

    for array in (embeds.hidden_states, embeds.attention_mask):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_numbers_of_rows_that_are_not_delivered_do_not_matter() -> None:
    """The padding of a rectangle may hold any numbers."""
    states = {FIRST: mx.array([[[1.0, 2.0], [float("nan"), 0.0]]])}
    [result] = selected(states, [make_job(1)])

    assert isinstance(result, PromptEmbeds)


@pytest.fixture
def encode(tmp_path: Path) -> Callable[..., list[PromptEmbeds]]:
    """Encodes prompts with a checkpoint of two layers, by a preset of the fields given."""
    write_checkpoint(tmp_path)
    text_encoder = TextEncoder.open(ModelOptions(str(tmp_path), compute_dtype="float32"))

    def encode(prompts: list[str], **fields: Any) -> list[PromptEmbeds]:
        return text_encoder.encode(
            prompts, Preset(name="x", description="", source="", **({"layers": (0, 1)} | fields)), "float32"
        )

    return encode


def assert_close(ours: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(ours, expected, atol=1e-5)  # float32, two layers


def test_padding_in_the_middle_leaves_the_tail_as_without_padding(encode: Callable[..., list[PromptEmbeds]]) -> None:
    """Krea 2: positions do not count the padding, and nobody looks at it."""
    template: dict[str, Any] = {"prefix": "<|im_start|>", "tail": "<|im_end|>\n", "max_sequence_length": 20}
    [padded] = encode(["a cat"], padding="max_length", padding_rows="zero", dropped_rows=1, **template)
    [compact] = encode(["a cat"], prefix="<|im_start|>", suffix="<|im_end|>\n")
    [cut] = encode(["a cat, and much that does not fit"], **template)

    assert padded.attention_mask.tolist() == [True] * 5 + [False] * 12 + [True] * 2
    assert_close(padded.hidden_states[padded.attention_mask], compact.hidden_states[1:])
    assert not padded.hidden_states[~padded.attention_mask].any()
    assert len(cut.attention_mask) == 20


def test_padding_rows_at_one_position_are_one_row_repeated(encode: Callable[..., list[PromptEmbeds]]) -> None:
    """FLUX.3: computing one of them gives what computing all would."""
    fields: dict[str, Any] = {"padding": "own", "pad_to_multiple_of": 8, "padding_rows": "live"}
    [ours] = encode(["a cat"], pad_position=1, **fields)
    [running_on] = encode(["a cat"], **fields)

    assert ours.attention_mask.tolist() == [True] * 5 + [False] * 3
    assert (ours.hidden_states[5:] == ours.hidden_states[5]).all()
    assert_close(ours.hidden_states[:5], running_on.hidden_states[:5])
    assert np.abs(ours.hidden_states[5] - running_on.hidden_states[5]).max() > 1e-3  # position 1 is not position 5


def test_a_live_padding_row_is_that_of_the_same_prompt_in_a_smaller_window(
    encode: Callable[..., list[PromptEmbeds]],
) -> None:
    """FLUX.2 klein: it sees the prompt and none of the padding, so the window does not matter to it."""
    small, large = (
        encode(["a cat"], padding="max_length", padding_rows="live", max_sequence_length=n)[0] for n in (8, 24)
    )

    assert_close(large.hidden_states[:8], small.hidden_states)
    assert np.abs(np.diff(large.hidden_states[5:], axis=0)).max() > 1e-3  # each at its own position


def test_an_empty_prompt_among_others_gets_zeros(encode: Callable[..., list[PromptEmbeds]]) -> None:
    """Anima: at least one row, all of it padding."""
    alone = encode([""], padding_rows="zero", min_length=1)
    beside = encode(["", "abc"], padding_rows="zero", min_length=1)

    assert [len(embeds.attention_mask) for embeds in alone + beside] == [1, 3, 3]
    assert not any(embeds.hidden_states.any() for embeds in (alone[0], beside[0]))
    assert [int(embeds.attention_mask.sum()) for embeds in alone + beside] == [0, 0, 3]
