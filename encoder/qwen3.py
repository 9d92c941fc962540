"""The Qwen3 decoder as an encoder: token ids in, hidden states out. Step 4 of the path.

Attributes are named as the checkpoint's keys, config fields as those of config.json, so loading needs no map.
Knows nothing of prompts, presets or padding rules.

Shape letters: B batch, L sequence length, D hidden size, H attention heads, K key-value heads, d head_dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from encoder.errors import CheckpointError
from encoder.types import Mask, Tap


@dataclass(frozen=True, slots=True)
class Qwen3Config:
    """Dims of a Qwen3 text model, under the names of config.json."""

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
        """Read a parsed config.json, of Qwen3 itself or of a Qwen3-VL that nests it under `text_config`.

        Errors: CheckpointError naming what is missing, of the wrong kind, or asks for an unsupported variant.
        Source of the defaults: transformers, models/qwen3/configuration_qwen3.py and qwen3_vl's.
        """
        text = config.get("text_config", config)
        if not isinstance(text, dict):
            raise CheckpointError("config.json: text_config is not an object. Is this a Qwen3 checkpoint?")
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
            attention_bias=bool(text.get("attention_bias", False)),
            attention_sinks=bool(text.get("attention_sinks", False)),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        )


def _refuse_other_models(text: dict[str, Any]) -> None:
    model_type = text.get("model_type", "qwen3")
    if model_type not in ("qwen3", "qwen3_vl_text"):
        raise CheckpointError(f"config.json: model_type is {model_type!r}, expected 'qwen3' or 'qwen3_vl_text'.")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act is {text['hidden_act']!r}, expected 'silu'.")
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        raise CheckpointError("config.json: sliding window attention is not supported, expected full_attention.")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # Interleaved mrope with equal text positions is plain RoPE, whatever its sections are.
    if rope_type not in ("default", "mrope"):
        raise CheckpointError(
            f"config.json: rope_type is {rope_type!r}, expected 'default'. RoPE scaling is not supported."
        )


def _number(text: dict[str, Any], key: str, default: float | None = None) -> float:
    value = text.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive number.")
    return float(value)


def _positive(text: dict[str, Any], key: str, default: int | None = None) -> int:
    value = text.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive integer.")
    return value


def _key_value_heads(text: dict[str, Any], num_attention_heads: int) -> int:
    if text.get("num_key_value_heads") is None:
        return num_attention_heads
    heads = _positive(text, "num_key_value_heads")
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
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim is {head_dim}, expected an even number: RoPE turns pairs.")
    return head_dim


def _rope_theta(text: dict[str, Any]) -> float:
    """transformers 5 writes rope_parameters; before it was top-level; some converters nest it in rope_scaling."""
    for place in (text.get("rope_parameters"), text, text.get("rope_scaling")):
        if isinstance(place, dict) and place.get("rope_theta") is not None:
            return _number(place, "rope_theta")
    return 500_000.0 if text.get("model_type") == "qwen3_vl_text" else 10_000.0


def apply_rope(x: mx.array, rope_theta: float, position_ids: mx.array | None = None) -> mx.array:
    """Rotate the first half of each head against the second by an angle that grows with the position.

    Args:
        x: (B, H, L, d), any float dtype; the rotation is computed in float32.
        rope_theta: base of the frequencies.
        position_ids: (B, L) int; None means 0, 1, 2, ...
    Returns:
        (B, H, L, d) in x's dtype.
    Source: transformers, models/qwen3/modeling_qwen3.py, apply_rotary_pos_emb (rotate_half).
    """
    if position_ids is None:
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=rope_theta, scale=1.0, offset=0)
    half = x.shape[-1] // 2
    frequencies = rope_theta ** (-mx.arange(half, dtype=mx.float32) / half)
    angles = position_ids[:, None, :, None].astype(mx.float32) * frequencies  # (B, 1, L, d/2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second = x[..., :half].astype(mx.float32), x[..., half:].astype(mx.float32)
    rotated = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def repeat_kv(x: mx.array, repeats: int) -> mx.array:
    """Expand key-value heads so that every attention head has its own: (B, K, L, d) to (B, K*repeats, L, d).

    MLX's attention groups by itself; this is for paths that don't.
    """
    return x if repeats == 1 else mx.repeat(x, repeats, axis=1)


def attend(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask = "causal", sinks: mx.array | None = None
) -> mx.array:
    """Scaled dot-product attention with grouped key-value heads.

    Args:
        q: (B, H, L, d). k, v: (B, K, L, d) where K divides H.
        scale: factor on the scores.
        mask: "causal", "none", or an array that broadcasts to (B, H, L, L): bool, True where query i may attend to
            key j, or additive in q's dtype.
        sinks: (H,) logits of one key per head that takes attention and gives nothing, or None.
    Returns:
        (B, H, L, d).
    """
    resolved = None if isinstance(mask, str) and mask == "none" else mask
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=resolved, sinks=sinks)


class Attention(nn.Module):
    """Grouped-query attention with an RMSNorm per head on queries and keys."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rope_theta = config.rope_theta
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim  # width need not be D
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.attention_sinks:
            self.sinks = mx.zeros((self.heads,))

    def __call__(self, x: mx.array, mask: Mask, position_ids: mx.array | None) -> mx.array:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(batch, length, self.heads, self.head_dim)).transpose(0, 2, 1, 3)
        k = self.k_norm(self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim)).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        q = apply_rope(q, self.rope_theta, position_ids)  # (B, H, L, d)
        k = apply_rope(k, self.rope_theta, position_ids)  # (B, K, L, d)
        out = attend(q, k, v, self.head_dim**-0.5, mask, self.get("sinks"))
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))  # (B, L, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normed input, each added to it."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Mask, position_ids: mx.array | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, position_ids)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The Qwen3 text model without its language-model head.

    Source: transformers, models/qwen3/modeling_qwen3.py, Qwen3Model.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self,
        input_ids: mx.array | None = None,
        *,
        inputs_embeds: mx.array | None = None,
        mask: Mask = "causal",
        position_ids: mx.array | None = None,
    ) -> mx.array:
        """The last hidden state after the final norm, (B, L, D). Arguments as in `hidden_states_at`."""
        last = Tap(depth=len(self.layers), normed=True)
        [out] = self.hidden_states_at(
            [last], input_ids, inputs_embeds=inputs_embeds, mask=mask, position_ids=position_ids
        )
        return out

    def hidden_states_at(
        self,
        taps: Sequence[Tap],
        input_ids: mx.array | None = None,
        *,
        inputs_embeds: mx.array | None = None,
        mask: Mask = "causal",
        position_ids: mx.array | None = None,
    ) -> list[mx.array]:
        """The hidden states at `taps`, in their order; no layer after the deepest of them runs.

        Args:
            taps: where to take hidden states.
            input_ids: (B, L) int, or
            inputs_embeds: (B, L, D): exactly one of the two.
            mask: as in `attend`.
            position_ids: (B, L) int; None means 0, 1, 2, ... in every row.
        Returns:
            one (B, L, D) for each tap.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Qwen3: give exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, mask, position_ids)
            if depth in wanted:
                outputs[depth] = x
        return [self.norm(outputs[tap.depth]) if tap.normed else outputs[tap.depth] for tap in taps]
