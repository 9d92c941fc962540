"""The prompts that every preset is tried with, and what equal means."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from app.reply.reply import collate
from encoder import Preset, TextEncoder, get_preset
from tests.reference import relative_error

T = TypeVar("T")

# Both sides round in float32, in another order, over 28 to 51 layers: up to 3e-5 here. What is wrong in a template, a
# layer or a norm is off by 1e-2 and more.
CLOSE = 1e-4

PROMPTS = [
    pytest.param([""], id="empty"),
    pytest.param(["a photo of a red fox sitting in deep snow under a pale blue sky at dawn, soft light"], id="plain"),
    pytest.param(["\n\n starts with newlines, ends with blanks \n "], id="blanks"),
    pytest.param(
        ["a fox 🦊, a family 👨‍👩‍👧, e\u0301te\u0301, ﬁn, 一只红色的狐狸坐在深雪里"], id="emoji-accents-chinese"
    ),
    pytest.param(["a sign: <|im_end|>\n<|im_start|>user\n<think> <|endoftext|> end"], id="special-tokens"),
    pytest.param(["a cat", "", "   ", "a much longer prompt about a dog that runs through tall grass"], id="batch"),
]
OVERLONG = ["a lighthouse over a stormy sea, oil on canvas, " * 60, "a cat"]


def encode(
    text_encoder: TextEncoder, prompts: Sequence[str], preset: str | Preset
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Hidden states and mask of all prompts in one batch, as a reply carries them."""
    embeds = text_encoder.encode(prompts, get_preset(preset) if isinstance(preset, str) else preset, "float32")
    hidden_states, mask = collate(embeds)
    return hidden_states.array, mask.array


def assert_equal(ours: Any, theirs: Any, rows: Any = None) -> None:
    """All numbers close, or those of some rows.

    Args:
        ours, theirs: (B, L, D) or (B, L, n, D).
        rows: (B, L) bool; the others are zero on both sides.
    """
    theirs = np.asarray(theirs)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    rows = np.ones(ours.shape[:2], bool) if rows is None else np.asarray(rows, bool)
    assert relative_error(ours[rows], theirs[rows]) < CLOSE
    assert not ours[~rows].any() and not theirs[~rows].any()


def assert_real_rows_equal(ours: Any, our_mask: Any, theirs: Any, their_mask: Any) -> None:
    """The rows of real tokens close, in their order. Other rows are zero here; there the denoiser masks them out."""
    theirs, their_mask = np.asarray(theirs), np.asarray(their_mask, bool)
    assert ours.dtype == theirs.dtype == np.float32
    assert our_mask.sum(axis=1).tolist() == their_mask.sum(axis=1).tolist()
    assert relative_error(ours[our_mask], theirs[their_mask]) < CLOSE
    assert not ours[~our_mask].any()


def last_layer(language_model: Any, encode: Callable[[], T]) -> T:
    """What code that asks for hidden_states[-1] gets where that is un-normed, as it was in transformers 4.57.

    Args:
        language_model: whose final norm is left out.
        encode: the code.
    """
    handle = language_model.norm.register_forward_hook(lambda module, arguments, output: arguments[0])
    try:
        return encode()
    finally:
        handle.remove()
