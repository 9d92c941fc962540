"""RoPE scaled for longer prompts, as config.json asks for it. tests/parity compares with transformers itself."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.rope import LinearScaling, YarnScaling
from tests.encoder.qwen3.test_config import without

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}  # as Qwen's pages advise
YARN_ATTENTION = 0.1 * math.log(4) + 1


def config_with(**fields: Any) -> Qwen3Config:
    return Qwen3Config.from_dict(without("rope_scaling") | fields)


def paper_frequencies(theta: float, head_dim: int, yarn: dict[str, Any]) -> NDArray[np.float64]:
    """Section 3.2 of the paper, in float64: between pairs that turn often in the training and rarely, a ramp."""

    def pair_of(turns: float) -> float:
        wavelength = yarn["original_max_position_embeddings"] / turns
        return head_dim / 2 * math.log(wavelength / (2 * math.pi), theta)

    first, last = math.floor(pair_of(32)), math.ceil(pair_of(1))
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    share = np.array([min(max((pair - first) / (last - first), 0.0), 1.0) for pair in range(head_dim // 2)])
    return plain * (1 - share) + plain / yarn["factor"] * share


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_yarn_is_read_wherever_it_stands(key: str, type_key: str) -> None:
    """Qwen's pages advise rope_scaling; transformers 5 saves it as rope_parameters."""
    fields = {type_key if name == "rope_type" else name: value for name, value in YARN.items()}
    scaling = config_with(**{key: fields}).rope_scaling

    assert scaling == YarnScaling(4.0, 32768, YARN_ATTENTION)


def test_yarn_has_the_frequencies_of_its_paper() -> None:
    """High ones are kept, low ones divided by the factor."""
    rope = config_with(rope_scaling=YARN).rope
    plain = config_with().rope

    np.testing.assert_allclose(rope.frequencies, paper_frequencies(1e6, 128, YARN), rtol=2e-6)
    assert rope.frequencies[0] == plain.frequencies[0]
    assert rope.frequencies[-1] == pytest.approx(plain.frequencies[-1] / 4)
    assert rope.frequencies.dtype == np.float32
    assert (rope.attention_factor, plain.attention_factor) == (YARN_ATTENTION, 1.0)


def test_linear_scaling_divides_all_frequencies() -> None:
    config = config_with(rope_scaling={"type": "linear", "factor": 2.5})

    assert config.rope_scaling == LinearScaling(2.5)
    np.testing.assert_allclose(config.rope.frequencies, config_with().rope.frequencies / 2.5, rtol=2e-7)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        pytest.param({"attention_factor": 1.5}, YarnScaling(4.0, 32768, 1.5), id="attention-factor"),
        pytest.param(
            {"attention_factor": None, "beta_slow": None}, YarnScaling(4.0, 32768, YARN_ATTENTION), id="nulls"
        ),
        pytest.param(
            {"beta_fast": 20, "beta_slow": 2, "truncate": False},
            YarnScaling(4.0, 32768, YARN_ATTENTION, 20.0, 2.0, False),
            id="all-fields",
        ),
        pytest.param(
            {"mscale": 2.0, "mscale_all_dim": 1.0},
            YarnScaling(4.0, 32768, (0.2 * math.log(4) + 1) / YARN_ATTENTION),
            id="mscale-of-deepseek",
        ),
        pytest.param({"mscale": 2.0}, YarnScaling(4.0, 32768, YARN_ATTENTION), id="mscale-alone-is-nothing"),
        pytest.param({"mrope_section": [24, 20, 20]}, YarnScaling(4.0, 32768, YARN_ATTENTION), id="qwen3-vl"),
        pytest.param({"factor": 0.5}, YarnScaling(0.5, 32768, 1.0), id="factor-below-one"),
        pytest.param({"factor": None}, YarnScaling(1.25, 32768, 0.1 * math.log(1.25) + 1), id="implied-factor"),
        pytest.param(
            {"original_max_position_embeddings": None}, YarnScaling(4.0, 40960, YARN_ATTENTION), id="implied-length"
        ),
    ],
)
def test_fields_of_yarn_mean_what_they_mean_in_transformers(fields: dict[str, Any], scaling: YarnScaling) -> None:
    """A field that were ignored would change hidden states silently."""
    assert config_with(rope_scaling=YARN | fields).rope_scaling == scaling


def test_length_of_the_training_beside_the_scaling_comes_first() -> None:
    """As in transformers."""
    config = config_with(rope_scaling=YARN, original_max_position_embeddings=2048)

    assert isinstance(config.rope_scaling, YarnScaling)
    assert config.rope_scaling.original_max_position_embeddings == 2048


def test_scaling_is_written_as_it_is_read() -> None:
    """`convert` writes the dims as config.json."""
    for scaling in (YARN, {"rope_type": "linear", "factor": 3.0}, None):
        config = config_with(rope_scaling=scaling)

        assert Qwen3Config.from_dict(asdict(config)) == config
    assert hash(config_with(rope_scaling=YARN)) == hash(config_with(rope_scaling=YARN))


def test_old_and_new_description_may_stand_together_where_they_agree() -> None:
    """A config that transformers 5 saved, and rope_scaling added by hand."""
    newer = {"rope_type": "default", "rope_theta": 1e6}

    assert config_with(rope_scaling=YARN, rope_parameters=newer) == config_with(rope_scaling=YARN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"rope_scaling": {"rope_type": "yarn"}}, "has no factor, expected a positive number", id="empty"),
        pytest.param({"rope_scaling": {"type": "linear"}}, "has no factor", id="linear-without-factor"),
        pytest.param({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4'", id="factor-string"),
        pytest.param(
            {"rope_scaling": YARN | {"factor": 1e9}}, "factor is 1000000000.0, expected a number", id="absurd"
        ),
        pytest.param({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is 0", id="no-attention"),
        pytest.param({"rope_scaling": YARN | {"truncate": "no"}}, "truncate is 'no'", id="truncate-string"),
        pytest.param({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast is -1", id="negative-beta"),
        pytest.param(
            {"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1.0, expected a number above 1", id="theta-of-one"
        ),
        pytest.param({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic'", id="dynamic"),
        pytest.param({"rope_scaling": {"rope_type": "longrope"}}, "'longrope'", id="longrope"),
        pytest.param({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3'", id="llama3"),
        pytest.param({"rope_scaling": {"rope_type": "proportional"}}, "'proportional'", id="proportional"),
        pytest.param({"rope_scaling": {"type": ["yarn"]}}, "RoPE is {'type': ", id="type-list"),
        pytest.param(
            {"text_config": without("rope_scaling"), "rope_scaling": YARN}, "within it. Move it there", id="outside"
        ),
        pytest.param({"rope_parameters": {"full_attention": YARN}}, "in all layers", id="one-rope-for-each-layer"),
        pytest.param(
            {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 5e6}}, "contradict each other", id="other-theta"
        ),
        pytest.param(
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": YARN},
            "contradict each other",
            id="other-type",
        ),
    ],
)
def test_rope_that_is_not_understood_is_refused(fields: dict[str, Any], message: str) -> None:
    """In one line that names the file."""
    with pytest.raises(CheckpointError, match=message) as raised:
        Qwen3Config.from_dict(without("rope_scaling") | fields, "a/config.json")

    assert str(raised.value).startswith("a/config.json: ")
