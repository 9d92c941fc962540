"""The dims of a Qwen3 text model, read from a checkpoint's config.json and validated.

Fields have the names that config.json gives them. A config that asks for something the encoder does not implement
(sliding windows, RoPE scaling, other activations) is an error.
"""

import math
from dataclasses import dataclass
from typing import Any

from encoder.errors import CheckpointError

MAX_DIM = 2**24  # far above any model, and array sizes still fit into 64 bits


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """Dims of a Qwen3 text model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool = False
    attention_sinks: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "Qwen3Config":
        """Read a parsed config.json of Qwen3, or of Qwen3-VL, which nests the text model under `text_config`.

        Errors: CheckpointError naming the key that is missing, has a wrong type, or asks for an unsupported variant.
        Source of the defaults: transformers, models/qwen3/configuration_qwen3.py and
            models/qwen3_vl/configuration_qwen3_vl.py.
        """
        text = _text_config(config)
        _refuse_other_models(text)
        num_attention_heads = _positive(text, "num_attention_heads")
        return cls(
            hidden_size=_positive(text, "hidden_size"),
            intermediate_size=_positive(text, "intermediate_size"),
            num_hidden_layers=_positive(text, "num_hidden_layers"),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=_key_value_heads(text, num_attention_heads),
            head_dim=_head_dim(text),
            vocab_size=_positive(text, "vocab_size"),
            rms_norm_eps=_number(text, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(text),
            max_position_embeddings=_positive(text, "max_position_embeddings", 32768),
            attention_bias=_flag(text, "attention_bias"),
            attention_sinks=_flag(text, "attention_sinks"),
            tie_word_embeddings=_flag(text, "tie_word_embeddings") or _flag(config, "tie_word_embeddings"),
        )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    if "text_config" not in config:
        return config
    text = config["text_config"]
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config is {text!r}, expected an object. Is this a Qwen3 checkpoint?")
    nested_type = "qwen3_vl_text" if config.get("model_type") == "qwen3_vl" else "qwen3"
    return {"model_type": nested_type} | text


def _refuse_other_models(text: dict[str, Any]) -> None:
    model_type = text.get("model_type", "qwen3")
    if model_type not in ("qwen3", "qwen3_vl_text"):
        raise CheckpointError(f"config.json: model_type is {model_type!r}, expected 'qwen3' or 'qwen3_vl_text'.")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act is {text['hidden_act']!r}, expected 'silu'.")
    layer_types = text.get("layer_types") or []
    if _flag(text, "use_sliding_window") or not isinstance(layer_types, list) or _has_other(layer_types):
        raise CheckpointError(
            f"config.json: use_sliding_window is {text.get('use_sliding_window')!r}, layer_types is {layer_types!r}, "
            f"expected full_attention in every layer and no sliding window."
        )
    for place in _rope_places(text):
        rope_type = place.get("rope_type") or place.get("type") or "default"
        # Interleaved mrope is plain RoPE here: in a text all three of its positions are equal.
        if rope_type not in ("default", "mrope") or (place.get("partial_rotary_factor") or 1.0) != 1.0:
            raise CheckpointError(f"config.json: RoPE is {place!r}, expected rope_type 'default' over whole heads.")


def _has_other(layer_types: list[Any]) -> bool:
    return any(layer_type != "full_attention" for layer_type in layer_types)


def _rope_places(text: dict[str, Any]) -> list[dict[str, Any]]:
    """The two objects that may describe RoPE, empty where absent or null.

    transformers 5 writes rope_parameters, older versions rope_scaling.
    """
    places = [text.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    for place in places:
        if not isinstance(place, dict):
            raise CheckpointError(f"config.json: RoPE is described by {place!r}, expected an object.")
    return places


def _rope_theta(text: dict[str, Any]) -> float:
    parameters, scaling = _rope_places(text)
    for place in (parameters, text, scaling):
        if place.get("rope_theta") is not None:
            return _number(place, "rope_theta")
    return 500_000.0 if text.get("model_type") == "qwen3_vl_text" else 10_000.0


def _key_value_heads(text: dict[str, Any], num_attention_heads: int) -> int:
    heads = _positive(text, "num_key_value_heads", num_attention_heads)
    if num_attention_heads % heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads {heads}."
        )
    return heads


def _head_dim(text: dict[str, Any]) -> int:
    # Qwen3's default is 128 whatever the hidden size; an explicit null means hidden_size / num_attention_heads.
    if "head_dim" in text and text["head_dim"] is None:
        head_dim = _positive(text, "hidden_size") // _positive(text, "num_attention_heads")
    else:
        head_dim = _positive(text, "head_dim", 128)
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"config.json: head_dim is {head_dim}, expected an even number: RoPE rotates pairs of values."
        )
    return head_dim


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected true or false.")
    return bool(value)


def _number(config: dict[str, Any], key: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value > 1e300:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive number.")
    return float(value)


def _positive(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DIM:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected an integer from 1 to {MAX_DIM}.")
    return value
