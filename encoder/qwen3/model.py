"""The Qwen3 decoder as an encoder: token ids in, hidden states out. The reference for all forward passes.

Attributes have the names of the checkpoint's keys, so that loading needs no map.
Knows nothing of prompts, presets or padding rules.

Shape letters: B batch, L sequence length, D hidden size, H attention heads, K key-value heads, d head_dim.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.rope import Rope
from encoder.types import Mask, Tap


def apply_rope(x: mx.array, rope: Rope, position_ids: mx.array | None = None) -> mx.array:
    """Rotary position embedding: rotate each pair (x[i], x[i + d/2]) of a head by position * frequency[i].

    Args:
        x: (B, H, L, d), any float dtype; the rotation is computed in float32.
        rope: the frequencies, and a factor on the rotated values.
        position_ids: (B, L) int; None means 0, 1, 2, ...
    Returns:
        (B, H, L, d) in x's dtype.
    Source: transformers, models/qwen3/modeling_qwen3.py, apply_rotary_pos_emb (rotate_half).
    """
    if position_ids is None and rope.scaling is None:
        return mx.fast.rope(
            x, rope.head_dim, traditional=False, base=None, scale=1.0, offset=0, freqs=mx.array(rope.periods)
        )
    if position_ids is None:
        position_ids = mx.arange(x.shape[-2])[None]  # (1, L)
    half = rope.head_dim // 2
    angles = position_ids[:, None, :, None].astype(mx.float32) * mx.array(rope.frequencies)  # (B, 1, L, d/2)
    cos, sin = mx.cos(angles) * rope.attention_factor, mx.sin(angles) * rope.attention_factor
    first, second = x[..., :half].astype(mx.float32), x[..., half:].astype(mx.float32)
    rotated = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def repeat_kv(x: mx.array, repeats: int) -> mx.array:
    """Repeat key-value heads so that every attention head has its own: (B, K, L, d) to (B, K*repeats, L, d).

    Not needed for MLX's attention, which takes grouped heads.
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
        sinks: (H,) logits of one extra key per head whose value is zero, or None.
    Returns:
        (B, H, L, d).
    """
    resolved = None if isinstance(mask, str) and mask == "none" else mask
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=resolved, sinks=sinks)


class Attention(nn.Module):
    """Grouped-query attention with an RMSNorm on each head of the queries and keys."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rope = config.rope
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
        q = apply_rope(q, self.rope, position_ids)  # (B, H, L, d)
        k = apply_rope(k, self.rope, position_ids)  # (B, K, L, d)
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
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The seven linear layers."""
        attention, mlp = self.self_attn, self.mlp
        return (
            *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
            *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )

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
        self.layers_run = 0  # a counter: decoder layers computed since construction

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
        """The hidden states at `taps`. Layers after the deepest tap do not run.

        Args:
            taps: where to take hidden states.
            input_ids: (B, L) int. Give exactly one of input_ids and inputs_embeds.
            inputs_embeds: (B, L, D), used in place of the embeddings of input_ids.
            mask: as in `attend`.
            position_ids: (B, L) int; None means 0, 1, 2, ... in every row.
        Returns:
            one (B, L, D) for each tap, in the order of `taps`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Qwen3: give exactly one of input_ids and inputs_embeds.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, L, D)
        wanted = {tap.depth for tap in taps}
        outputs = {0: x}
        for depth, layer in enumerate(self.layers[: max(wanted)], start=1):
            x = layer(x, mask, position_ids)
            self.layers_run += 1
            if depth in wanted:
                outputs[depth] = x
        return [self.norm(outputs[tap.depth]) if tap.normed else outputs[tap.depth] for tap in taps]
