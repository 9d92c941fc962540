"""Compares a fast forward pass with the plain one on a tiny model with random weights, before it serves requests."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.model import Qwen3
from encoder.qwen3.plain import PlainForward
from encoder.types import Job, Rows, Tap

# Small, and no multiple of the kernels' tiles and panels, so that each has an incomplete one.
CONFIG = Qwen3Config.from_dict(
    {
        "model_type": "qwen3",
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "vocab_size": 97,
        "rope_theta": 1e6,
    }
)
TAPS = (Tap(1, normed=False), Tap(2, normed=True))


class ComparedPass(Protocol):
    """The part of `encoder.qwen3.forward.Forward` that is compared. That module imports this one."""

    def __call__(self, jobs: Sequence[Job], taps: Sequence[Tap]) -> Mapping[Tap, Rows]:
        """For each tap, the computed rows of each job."""


def largest_error(make_pass: Callable[[Qwen3], ComparedPass], dtype: mx.Dtype) -> float:
    """The largest difference between a pass and the plain one, relative to the largest number of a row. May be NaN.

    Both compute in float32, from weights that `dtype` can hold.

    Args:
        make_pass: makes the pass from a model, which it may take over.
        dtype: of the model's matrices.
    """
    jobs = [_job(1, 1), _job(21, 50), _job(40, 40), _job(3, 40, pad_position=1)]
    expected = PlainForward(_model(dtype, mx.float32))(jobs, TAPS)
    found = make_pass(_model(dtype, dtype))(jobs, TAPS)
    errors = [
        _error(*(np.array(rows[tap][index][: job.computed_rows]) for rows in (found, expected)))
        for tap in TAPS
        for index, job in enumerate(jobs)
    ]
    return float(np.max(errors))


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((np.abs(found - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max())


def _job(tokens: int, rows: int, pad_position: int | None = None) -> Job:
    input_ids = np.random.default_rng(tokens).integers(0, CONFIG.vocab_size, tokens)
    return Job(
        input_ids=tuple(input_ids.tolist()),
        computed_rows=rows,
        delivered_rows=rows,
        dropped_rows=0,
        taps=TAPS,
        combine="concat",
        dtype="float32",
        pad_position=pad_position,
        pad_token_id=CONFIG.vocab_size - tokens,  # jobs of one batch may pad with different tokens
    )


def _model(rounded_to: mx.Dtype, dtype: mx.Dtype) -> Qwen3:
    """A model of always the same random weights: matrices rounded to one dtype and stored in another, float32 norms."""
    model, random = Qwen3(CONFIG), np.random.default_rng(0)
    weights = []
    for name, parameter in dict(tree_flatten(model.parameters())).items():
        if parameter.ndim == 2:
            matrix = mx.array(random.standard_normal(parameter.shape, np.float32)) / parameter.shape[1] ** 0.5
            weights.append((name, matrix.astype(rounded_to).astype(dtype)))
        else:
            weights.append((name, mx.array(random.uniform(0.5, 1.5, parameter.shape).astype(np.float32))))
    model.update(tree_unflatten(weights))
    return model
