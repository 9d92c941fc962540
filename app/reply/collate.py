"""Puts the rows of all prompts of a request into one tensor and one mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.wire import Tensor
from encoder import PromptEmbeds


def collate(prompts: Sequence[PromptEmbeds]) -> tuple[Tensor, Tensor]:
    """hidden_states and attention_mask of all prompts; short ones are padded with zeros on the right.

    Args:
        prompts: (L, D), (n, L, D) or (L, n, D) each, all of one request.
    Returns:
        (B, L, D), (B, n, L, D) or (B, L, n, D) with the longest L, and (B, L) bool. One prompt is passed on uncopied.
    """
    length = max(len(prompt.attention_mask) for prompt in prompts)
    hidden_states = _stack([prompt.hidden_states for prompt in prompts], length, prompts[0].rows_axis)
    attention_mask = _stack([prompt.attention_mask for prompt in prompts], length, 0)
    return Tensor(hidden_states, prompts[0].dtype), Tensor(attention_mask, "bool")


def is_ragged(prompts: Sequence[PromptEmbeds]) -> bool:
    """Whether collating pads, so that only the mask tells the padding from rows of the prompt."""
    return len({len(prompt.attention_mask) for prompt in prompts}) > 1


def _stack(arrays: Sequence[NDArray[Any]], length: int, axis: int) -> NDArray[Any]:
    """The arrays in one, each padded with zeros to `length` along `axis`."""
    if len(arrays) == 1:
        return arrays[0][None]
    shape = list(arrays[0].shape)
    shape[axis] = length
    out = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for place, array in zip(out, arrays, strict=True):
        place[(slice(None),) * axis + (slice(array.shape[axis]),)] = array
    return out
