"""The dims of a Qwen3 text model, read from a checkpoint's config.json and validated.

Fields have the names that config.json gives them. A config that asks for something the encoder does not implement
(sliding windows, other activations, RoPE scaled in other ways than linear and YaRN) is an error.
"""

from dataclasses import dataclass
from typing import Any

from encoder.errors import CheckpointError
from encoder.messages import shown
from encoder.qwen3.fields import Fields
from encoder.qwen3.rope import Rope, Scaling, read_rope, refuse_scaling_outside, states_theta

DEFAULT_THETA, DEFAULT_VL_THETA = 10_000.0, 500_000.0  # where a config names none


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
    rope_scaling: Scaling | None = None

    @property
    def rope(self) -> Rope:
        """The rotation of queries and keys."""
        return Rope(self.rope_theta, self.head_dim, self.rope_scaling)

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str = "config.json") -> "Qwen3Config":
        """Read a parsed config.json of Qwen3, or of Qwen3-VL, which nests the text model under `text_config`.

        Args:
            config: the fields, as parsed.
            where: the file that says them, for messages.
        Errors: CheckpointError naming the key that is missing, has a wrong type, or asks for an unsupported variant.
        Source of the defaults: transformers, models/qwen3/configuration_qwen3.py and
            models/qwen3_vl/configuration_qwen3_vl.py.
        """
        top = Fields(config, where)
        text = _text_config(top)
        _refuse_other_models(text)
        num_attention_heads = text.positive("num_attention_heads")
        vision = text.get("model_type") == "qwen3_vl_text"
        max_position_embeddings = text.positive("max_position_embeddings", 128_000 if vision else 32_768)
        theta, scaling = read_rope(text, DEFAULT_VL_THETA if vision else DEFAULT_THETA, max_position_embeddings)
        return cls(
            hidden_size=text.positive("hidden_size"),
            intermediate_size=text.positive("intermediate_size"),
            num_hidden_layers=text.positive("num_hidden_layers"),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=_key_value_heads(text, num_attention_heads),
            head_dim=_head_dim(text),
            vocab_size=text.positive("vocab_size"),
            rms_norm_eps=text.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            max_position_embeddings=max_position_embeddings,
            attention_bias=text.flag("attention_bias"),
            attention_sinks=text.flag("attention_sinks"),
            tie_word_embeddings=text.flag("tie_word_embeddings") or top.flag("tie_word_embeddings"),
            rope_scaling=scaling,
        )


def states_rope_theta(config: dict[str, Any]) -> bool:
    """Whether a config.json that `Qwen3Config.from_dict` understands says rope_theta, or leaves it to the default."""
    return states_theta(_text_config(Fields(config, "config.json")))


def _text_config(top: Fields) -> Fields:
    if top.get("text_config") is None:
        return top
    text = top.values["text_config"]
    if not isinstance(text, dict):
        raise CheckpointError(
            f"{top.where}: text_config is {shown(text)}, expected an object. Is this a Qwen3 checkpoint?"
        )
    refuse_scaling_outside(top)
    nested_type = "qwen3_vl_text" if top.get("model_type") == "qwen3_vl" else "qwen3"
    return Fields({"model_type": nested_type} | text, top.where)


def _refuse_other_models(text: Fields) -> None:
    if "_class_name" in text.values:
        raise text.wrong("_class_name", "the config of a text encoder: this part of a pipeline is another")
    if text.get("model_type", "qwen3") not in ("qwen3", "qwen3_vl_text"):
        raise text.wrong("model_type", "'qwen3' or 'qwen3_vl_text'")
    if text.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise text.wrong("hidden_act", "'silu'")
    if _has_windows(text):
        raise CheckpointError(
            f"{text.where}: use_sliding_window is {shown(text.get('use_sliding_window'))}, layer_types is "
            f"{shown(text.get('layer_types'))}, expected full_attention in every layer: windows are not implemented."
        )


def _has_windows(text: Fields) -> bool:
    """Whether a layer attends to the last tokens only. Where no layer_types are given, the last layers do."""
    layer_types = text.get("layer_types")
    if layer_types is not None:
        return not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    no_size = "sliding_window" in text.values and text.values["sliding_window"] is None
    if not text.flag("use_sliding_window") or no_size:
        return False
    first = text.get("max_window_layers", 28)
    return not isinstance(first, int) or first < text.positive("num_hidden_layers")


def _key_value_heads(text: Fields, num_attention_heads: int) -> int:
    heads = text.positive("num_key_value_heads", num_attention_heads)
    if num_attention_heads % heads:
        raise CheckpointError(
            f"{text.where}: num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads {heads}."
        )
    return heads


def _head_dim(text: Fields) -> int:
    # Qwen3's default is 128 whatever the hidden size; an explicit null means hidden_size / num_attention_heads.
    if "head_dim" in text.values and text.values["head_dim"] is None:
        head_dim = text.positive("hidden_size") // text.positive("num_attention_heads")
    else:
        head_dim = text.positive("head_dim", 128)
    if head_dim < 2 or head_dim % 2:
        raise CheckpointError(
            f"{text.where}: head_dim is {head_dim}, expected an even number: RoPE rotates pairs of values."
        )
    return head_dim
