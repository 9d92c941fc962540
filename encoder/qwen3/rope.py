"""RoPE: by which angle each pair of values in a head is rotated at a position, plain or scaled for longer prompts.

Scaling changes the angles at every position, also in a prompt that is short.
Source: transformers, modeling_rope_utils.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.qwen3.fields import Fields

Numbers = NDArray[np.float32]

_PLAIN = ("default", "mrope")  # interleaved mrope is plain RoPE here: in a text all three of its positions are equal
_MAX_SCALE = 1e6  # of a factor, far above any model
_ONE = np.float32(1)


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies are divided by `factor`. Fields are named as in config.json."""

    factor: float
    rope_type: Literal["linear"] = "linear"


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN: low frequencies are divided by `factor`, high ones are kept. Fields are named as in config.json.

    Attributes:
        factor: by which prompts may be longer than in training.
        original_max_position_embeddings: longest prompt of the training, in tokens.
        attention_factor: on cosines and sines, and so, squared, on the scores of attention.
        beta_fast: a pair that turns more often in the longest prompt of the training is kept.
        beta_slow: a pair that turns less often is divided by all of `factor`.
        truncate: whether the two limits between pairs are rounded to whole pairs.
    Source: https://arxiv.org/abs/2309.00071
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    rope_type: Literal["yarn"] = "yarn"


Scaling = LinearScaling | YarnScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation of a model.

    Attributes:
        theta: base of the frequencies.
        head_dim: values in a head, an even number.
        scaling: None for plain RoPE.
    """

    theta: float
    head_dim: int
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0

    @property
    def periods(self) -> Numbers:
        """1 / frequency for each pair of values in a head, before scaling, (d/2,).

        Computed in float64 and rounded once, which gives PyTorch's values, but for one of 64 in its last bit: a wrong
        last bit changes the angle at position 2047 by 2e-4.
        """
        return (self.theta ** (np.arange(0, self.head_dim, 2) / self.head_dim)).astype(np.float32)

    @property
    def frequencies(self) -> Numbers:
        """The angle of each pair at position 1, in radians, (d/2,). Rounded step by step as transformers rounds."""
        if isinstance(self.scaling, LinearScaling):
            return _ONE / self.periods / np.float32(self.scaling.factor)
        if isinstance(self.scaling, YarnScaling):
            return self._yarn_frequencies(self.scaling)
        return _ONE / self.periods

    def _yarn_frequencies(self, scaling: YarnScaling) -> Numbers:
        first, last = self._yarn_range(scaling)
        pairs = np.arange(self.head_dim // 2, dtype=np.float32)
        kept = _ONE - ((pairs - np.float32(first)) / np.float32(last - first)).clip(0, 1)
        divided = _ONE / (np.float32(scaling.factor) * self.periods)
        frequencies: Numbers = divided * (_ONE - kept) + _ONE / self.periods * kept
        return frequencies

    def _yarn_range(self, scaling: YarnScaling) -> tuple[float, float]:
        """The last pair that is kept, and the first that is divided by all of the factor."""
        first, last = (self._pair_that_turns(beta, scaling) for beta in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.head_dim - 1)
        return first, last + 0.001 if first == last else last

    def _pair_that_turns(self, times: float, scaling: YarnScaling) -> float:
        """The pair, as a fraction, that turns so many times in the longest prompt of the training."""
        length = scaling.original_max_position_embeddings
        return self.head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(self.theta))

    def cos_sin(self, position_ids: Numbers) -> tuple[Numbers, Numbers]:
        """Cosine and sine of each pair's angle, times the attention factor: (T,) float32 to (T, d/2) each."""
        angles = position_ids[:, None] * self.frequencies
        factor = np.float32(self.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


def read_rope(text: Fields, default_theta: float, max_position_embeddings: int) -> tuple[float, Scaling | None]:
    """rope_theta, and the scaling that the config of a text model asks for.

    transformers 5 writes `rope_parameters`; older versions wrote `rope_scaling` beside `rope_theta`. Where both stand,
    transformers takes rope_scaling and forgets all of rope_parameters.

    Errors: CheckpointError for a RoPE that is not implemented, and where the two contradict each other.
    """
    older, newer, chosen = _places(text)
    _refuse_partial_rope(text)
    _refuse_other_ropes(older)
    _refuse_other_ropes(newer)
    stating = chosen if chosen.get("rope_theta") is not None else text
    theta = stating.number("rope_theta", default_theta)
    if theta <= 1:
        raise stating.wrong("rope_theta", "a number above 1")
    forgotten = newer.number("rope_theta", theta) != theta or _rope_type(newer) not in (_rope_type(chosen), *_PLAIN)
    if forgotten:
        raise CheckpointError(
            f"{text.where}: rope_scaling {shown(older.values)} and rope_parameters {shown(newer.values)} contradict "
            f"each other, and transformers takes the first alone. Remove one of the two."
        )
    return theta, _scaling(chosen, text, max_position_embeddings)


def refuse_scaling_outside(top: Fields) -> None:
    """Errors: CheckpointError for a scaling beside `text_config`, where it would have no effect."""
    place = _places(top)[-1]
    if _rope_type(place) not in _PLAIN:
        raise CheckpointError(
            f"{top.where}: RoPE is {shown(place.values)} beside text_config, expected within it. Move it there."
        )


def states_theta(text: Fields) -> bool:
    """Whether the config of a text model says rope_theta, where `read_rope` looks for it."""
    return any(place.get("rope_theta") is not None for place in (text, _places(text)[-1]))


def _places(text: Fields) -> tuple[Fields, Fields, Fields]:
    """rope_scaling, rope_parameters, and the one of the two that counts."""
    older, newer = text.inner("rope_scaling"), text.inner("rope_parameters")
    return older, newer, older if older.values else newer


def _refuse_other_ropes(place: Fields) -> None:
    _refuse_partial_rope(place)
    known = (*_PLAIN, "linear", "yarn")
    per_layer = any(isinstance(value, dict) for value in place.values.values())
    if per_layer or _rope_type(place) not in known:
        raise CheckpointError(
            f"{place.where}: RoPE is {shown(place.values)}, expected one of the types {', '.join(known)} in all layers."
        )


def _refuse_partial_rope(place: Fields) -> None:
    if place.get("partial_rotary_factor", 1.0) != 1.0:
        raise place.wrong("partial_rotary_factor", "1: RoPE over whole heads")


def _rope_type(place: Fields) -> Any:
    return place.get("rope_type", place.get("type", "default"))


def _scaling(place: Fields, text: Fields, max_position_embeddings: int) -> Scaling | None:
    """The scaling that one of the two objects describes."""
    if _rope_type(place) in _PLAIN:
        return None
    if _rope_type(place) == "linear":
        return LinearScaling(_scale(place, "factor"))
    # A field beside rope_scaling comes first, as in transformers, and the longest prompt of all is what is left.
    stated = text if text.get("original_max_position_embeddings") is not None else place
    original = stated.positive("original_max_position_embeddings", max_position_embeddings)
    implied = max_position_embeddings / original if stated.get("original_max_position_embeddings") is not None else None
    factor = _scale(place, "factor", implied)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=_scale(place, "attention_factor", _attention_factor(place, factor)),
        beta_fast=_scale(place, "beta_fast") if place.get("beta_fast") else 32.0,
        beta_slow=_scale(place, "beta_slow") if place.get("beta_slow") else 1.0,
        truncate=True if "truncate" not in place.values else place.flag("truncate"),
    )


def _attention_factor(place: Fields, factor: float) -> float:
    """What the attention factor is where the config does not say it."""
    if place.get("mscale") and place.get("mscale_all_dim"):
        return yarn_attention_factor(factor, _scale(place, "mscale"), _scale(place, "mscale_all_dim"))
    return yarn_attention_factor(factor)


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    """The attention factor of YaRN's paper, 0.1 log(factor) + 1, and of DeepSeek, which divides two of its kind."""
    numerator, denominator = (0.1 * scale * math.log(max(factor, 1.0)) + 1.0 for scale in (mscale, mscale_all_dim))
    return numerator / denominator


def _scale(place: Fields, key: str, default: float | None = None) -> float:
    value = place.number(key, default)
    if not 1 / _MAX_SCALE <= value <= _MAX_SCALE:
        raise place.wrong(key, f"a number from {1 / _MAX_SCALE:g} to {_MAX_SCALE:g}")
    return value
