"""config.json as found in the wild, read into the dims of the model."""

from typing import Any

import pytest

from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    """Qwen3-4B's config with some fields left out and some changed."""
    return {key: value for key, value in QWEN3_4B.items() if key not in keys} | changes


def test_published_config_is_read() -> None:
    """Qwen3-4B, as on the hub."""
    assert Qwen3Config.from_dict(QWEN3_4B) == Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def test_text_config_of_a_vision_model_is_read() -> None:
    """Qwen3-VL nests the dims, and its interleaved mrope is plain RoPE on text."""
    mrope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default", "rope_theta": 5e6}
    text = without(
        "rope_theta", "rope_scaling", "tie_word_embeddings", model_type="qwen3_vl_text", rope_parameters=mrope
    )
    config = Qwen3Config.from_dict(
        {"model_type": "qwen3_vl", "text_config": text, "vision_config": {}, "tie_word_embeddings": True}
    )

    assert config.hidden_size == 2560
    assert config.rope_theta == 5e6
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        pytest.param({"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}, 2e6, id="rope_parameters"),
        pytest.param({"rope_theta": 2000000, "rope_scaling": None}, 2e6, id="top-level"),
        pytest.param({"rope_scaling": {"type": "mrope", "rope_theta": 2e6}}, 2e6, id="rope_scaling"),
        pytest.param({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e6}}, 2e6, id="newest-place-wins"),
        pytest.param({"rope_theta": 2e6, "rope_parameters": {"rope_type": "default"}}, 2e6, id="parameters-without"),
        pytest.param({}, 1e4, id="default"),
        pytest.param({"model_type": "qwen3_vl_text"}, 5e5, id="default-of-vision-models"),
    ],
)
def test_rope_theta_is_found_wherever_it_stands(fields: dict[str, Any], theta: float) -> None:
    """transformers has moved it twice; a wrong theta gives plausible nonsense."""
    assert Qwen3Config.from_dict(without("rope_theta", "rope_scaling") | fields).rope_theta == theta


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        pytest.param(without("head_dim"), 128, id="missing"),
        pytest.param(without("head_dim", hidden_size=16), 128, id="missing-in-a-small-model"),
        pytest.param(without(head_dim=None), 80, id="null"),
        pytest.param(without(head_dim=96), 96, id="given"),
    ],
)
def test_head_dim_is_read_or_defaulted(config: dict[str, Any], head_dim: int) -> None:
    """Qwen3's default is 128 whatever the hidden size."""
    assert Qwen3Config.from_dict(config).head_dim == head_dim


@pytest.mark.parametrize(
    "same",
    [
        pytest.param({"model_type": None, "text_config": None, "hidden_act": None}, id="null-is-absent"),
        pytest.param({"hidden_act": "swish"}, id="other-name-of-silu"),
        pytest.param({"use_sliding_window": True, "sliding_window": None}, id="windows-without-a-size"),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36},
            id="windows-after-the-last-layer",
        ),
        pytest.param(
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"] * 36},
            id="windows-in-no-layer",
        ),
    ],
)
def test_config_that_means_the_same_in_transformers_is_read(same: dict[str, Any]) -> None:
    """Converters and people write it in many ways; in transformers layer_types decide, then max_window_layers."""
    assert Qwen3Config.from_dict(without(**same)) == Qwen3Config.from_dict(without())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({}, "has no num_attention_heads", id="empty"),
        pytest.param(without("hidden_size"), "has no hidden_size", id="missing"),
        pytest.param(without(hidden_size="2560"), "hidden_size is '2560'", id="string"),
        pytest.param(without(num_hidden_layers=0), "num_hidden_layers is 0", id="zero"),
        pytest.param(without(num_hidden_layers=True), "num_hidden_layers is True", id="bool"),
        pytest.param(without(vocab_size=-1), "vocab_size is -1", id="negative"),
        pytest.param(without(rms_norm_eps=float("nan")), "rms_norm_eps is nan", id="nan"),
        pytest.param(without(rope_theta=float("inf")), "rope_theta is inf", id="infinite"),
        pytest.param(without(num_key_value_heads=5), "32 is not a multiple of num_key_value_heads 5", id="kv-heads"),
        pytest.param(without(head_dim=127), "head_dim is 127, expected an even number", id="odd-head-dim"),
        pytest.param(without(model_type="llama"), "model_type is 'llama'", id="other-model"),
        pytest.param(without(model_type="qwen3_moe"), "model_type is 'qwen3_moe'", id="mixture-of-experts"),
        pytest.param(without(hidden_act="gelu"), "hidden_act is 'gelu'", id="other-activation"),
        pytest.param(
            without(use_sliding_window=True, sliding_window=4096, max_window_layers=35), "windows", id="sliding-window"
        ),
        pytest.param(without(rope_scaling="linear"), "rope_scaling is 'linear', expected an object", id="rope-string"),
        pytest.param(without(rope_parameters=[1]), r"rope_parameters is \[1\]", id="rope-list"),
        pytest.param(without(rope_parameters={"partial_rotary_factor": 0.5}), "over whole heads", id="partial-rope"),
        pytest.param(without(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5", id="partial-rope-outside"),
        pytest.param(without(layer_types=5), "expected full_attention", id="layer-types-number"),
        pytest.param(
            without(layer_types=["full_attention", "sliding_attention"]), "expected full_attention", id="layer-types"
        ),
        pytest.param(without(rms_norm_eps=10**400), "rms_norm_eps is 1000", id="over-float"),
        pytest.param(without(hidden_size=2**40), "expected an integer from 1 to 16777216", id="absurd-size"),
        pytest.param(without(attention_bias="false"), "attention_bias is 'false'", id="flag-string"),
        pytest.param({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'", id="part-of-a-pipeline"),
        pytest.param({"text_config": "qwen3"}, "text_config is 'qwen3'", id="text-config-string"),
    ],
)
def test_config_that_is_not_understood_is_refused(config: dict[str, Any], message: str) -> None:
    """Each would give wrong hidden states, or a crash far from its cause."""
    with pytest.raises(CheckpointError, match=message) as raised:
        Qwen3Config.from_dict(config, "a/config.json")

    assert str(raised.value).startswith("a/config.json: ")
    assert len(str(raised.value)) < 400
