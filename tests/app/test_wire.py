"""Tensors to bytes and back."""

import ml_dtypes
import numpy as np
import pytest

from app import wire
from app.collate import collate, is_ragged
from app.wire import Tensor, WireError
from encoder import PromptEmbeds


def test_bfloat16_widens_exactly() -> None:
    bits = np.arange(2**16, dtype=np.uint16)

    np.testing.assert_array_equal(Tensor(bits, "bfloat16").float32(), bits.view(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("array", [np.zeros((0, 3)), np.arange(24).reshape(2, 3, 4), np.arange(24).reshape(4, 6).T])
def test_any_layout_survives(array: np.ndarray) -> None:
    tensor = Tensor(array.astype(np.float32), "float32")

    [back] = wire.unpack(wire.pack({"t": tensor})).values()

    np.testing.assert_array_equal(back.array, tensor.array)


def test_bytes_of_a_contiguous_array_are_no_copy() -> None:
    array = np.zeros(4, np.float32)
    data = Tensor(array, "float32").tobytes()
    array[0] = 1

    assert bytes(data[:4]) == np.float32(1).tobytes()


@pytest.mark.parametrize(
    ("dtype", "shape", "length"),
    [("float64", (1,), 8), ("float32", (2,), 4), ("float32", (-1,), 4), ("bfloat16", (2, 2), 9), ("bool", (), 0)],
)
def test_bytes_that_do_not_fit_their_description_are_refused(dtype: str, shape: tuple[int, ...], length: int) -> None:
    with pytest.raises(WireError):
        Tensor.frombytes(bytes(length), dtype, shape)


def embeds(*shape: int) -> PromptEmbeds:
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return PromptEmbeds(rows, np.ones(shape[-2], bool), "float32", rows_axis=len(shape) - 2)


@pytest.mark.parametrize("front", [(), (3,)], ids=["concat", "stack"])
def test_collating_pads_the_rows_on_the_right(front: tuple[int, ...]) -> None:
    short, long = embeds(*front, 2, 4), embeds(*front, 5, 4)

    hidden_states, mask = collate([short, long])

    assert hidden_states.array.shape == (2, *front, 5, 4)
    np.testing.assert_array_equal(hidden_states.array[0][..., :2, :], short.hidden_states)
    assert (hidden_states.array[0][..., 2:, :] == 0).all()
    np.testing.assert_array_equal(hidden_states.array[1], long.hidden_states)
    assert mask.array.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert is_ragged([short, long])
    assert not is_ragged([long, long])


def test_collating_one_prompt_copies_nothing() -> None:
    one = embeds(5, 4)

    assert np.shares_memory(collate([one])[0].array, one.hidden_states)
