"""Tensors to bytes and back."""

import json
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load

from app import wire
from app.reply.reply import JOIN_BELOW, collate, is_ragged, joined
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
    "lengths", [(0,), (1,), (255,), (256,), (65_535,), (65_536,), (100_000, 3), (3, 256, 100_000), ()], ids=str
)
@pytest.mark.parametrize(
    "facts", [{}, {"model": "模型 🐈", "num_tokens": [1, 300], "truncated": [True], "usage": {"a": {}}}]
)
def test_msgpack_is_what_msgpack_itself_writes(lengths: tuple[int, ...], facts: dict[str, Any]) -> None:
    """Lengths on both sides of every border between the forms of `bin`."""
    tensors = {f"ten{place}": Tensor(np.ones(length, bool), "bool") for place, length in enumerate(lengths)}
    plain = {key: {"dtype": "bool", "shape": [len(x.array)], "data": x.array.tobytes()} for key, x in tensors.items()}

    assert wire.pack(facts | tensors | facts) == msgpack.packb(facts | plain | facts)
    assert wire.pack(tensors | {"last": 1.5}) == msgpack.packb(plain | {"last": 1.5})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 3, 300), (2, 3, 4, 5), (1, 0, 8), (4, 16_000)], ids=str)
def test_msgpack_has_tensors_of_any_shape(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape)) % 1000).reshape(shape).astype(wire.NUMPY_DTYPES[dtype])
    document = {"model": "m", "hidden_states": Tensor(array, dtype), "attention_mask": Tensor(array > 1, "bool")}

    assert wire.pack(document) == msgpack.packb(
        {
            "model": "m",
            "hidden_states": {"dtype": dtype, "shape": list(shape), "data": array.tobytes()},
            "attention_mask": {"dtype": "bool", "shape": list(shape), "data": (array > 1).tobytes()},
        }
    )


@pytest.mark.parametrize("pack_parts", [wire.pack_parts, wire.pack_safetensors_parts])
def test_the_parts_of_a_body_have_the_tensors_own_memory(pack_parts: Any) -> None:
    array = np.zeros(100_000, np.float32)

    parts = pack_parts({"model": "m", "hidden_states": Tensor(array, "float32")})

    assert [np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts if part].count(True) == 1


@pytest.mark.parametrize("pack_parts", [wire.pack_parts, wire.pack_safetensors_parts])
def test_a_read_only_array_can_be_packed(pack_parts: Any) -> None:
    """As results are."""
    array = np.zeros((2, 3), np.float32)
    array.setflags(write=False)

    assert pack_parts({"hidden_states": Tensor(array, "float32")})


def test_safetensors_reads_the_joined_parts() -> None:
    x, mask = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([True, False, True])

    found = load(wire.pack_safetensors({"mask": Tensor(mask, "bool"), "x": Tensor(x, "float32"), "model": "m"}))

    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["mask"], mask)


@pytest.mark.parametrize("name", ["m" * length for length in range(8)])
def test_safetensors_start_where_their_dtype_can_be_mapped(name: str) -> None:
    """A reader that maps the file needs each tensor on a multiple of its item size, however long the header is."""
    x, mask = np.ones((3, 5), np.float32), np.ones(3, np.bool_)

    body = wire.pack_safetensors({"mask": Tensor(mask, "bool"), "x": Tensor(x, "float32"), "model": name})

    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert header["x"]["data_offsets"][0] % 4 == 0


@pytest.mark.parametrize(
    ("lengths", "messages"),
    [
        ([10, 20, 30], [60]),
        ([10, JOIN_BELOW, 20, 30], [10, JOIN_BELOW, 50]),
        ([JOIN_BELOW, JOIN_BELOW - 1, 1], [JOIN_BELOW, JOIN_BELOW]),
        ([JOIN_BELOW, JOIN_BELOW + 1], [JOIN_BELOW, JOIN_BELOW + 1]),
        ([JOIN_BELOW - 1, 1, 0], [JOIN_BELOW]),
        ([0, JOIN_BELOW, 0], [JOIN_BELOW]),
        ([0], []),
    ],
    ids=["small", "one large", "small behind large", "large alone", "nothing behind many", "nothing", "empty"],
)
def test_small_parts_are_joined_and_large_ones_are_not(lengths: list[int], messages: list[int]) -> None:
    parts: wire.Parts = [memoryview(bytes([place % 256]) * n) for place, n in enumerate(lengths)]

    found = list(joined(parts))

    assert [len(message) for message in found] == messages
    assert b"".join(found) == b"".join(parts)
    assert all(any(part is message for message in found) for part in parts if len(part) >= JOIN_BELOW)


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
