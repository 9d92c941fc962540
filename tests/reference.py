"""Qwen3 in float64 NumPy, from the architecture and sharing no code with `encoder`: what the tests compare with.

One sequence at a time, so there is no batch that could go wrong. `config` holds the names of config.json, `weights` the
checkpoint's keys without prefix. Shape letters: L sequence length, D hidden size, H attention heads, K key-value heads,
d head_dim.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Config = Mapping[str, Any]
Weights = Mapping[str, NDArray[Any]]


def hidden_states(
    config: Config,
    weights: Weights,
    input_ids: Sequence[int],
    *,
    num_tokens: int | None = None,
    mask: ArrayLike | None = None,
    position_ids: ArrayLike | None = None,
) -> list[Array]:
    """All N+1 hidden states of a sequence, each (L, D): the embedding output, then each layer's, the last normed.

    Args:
        input_ids: L token ids, padding included.
        num_tokens: how many of them are real; the rest is padding that no row sees. None means all.
        mask: (L, L) bool, True where row i sees row j, or float, added to the scores; in place of the default, where a
            row sees the real tokens up to its own.
        position_ids: (L,), None means 0, 1, 2, ...
    """
    rows = np.arange(len(input_ids))
    real = rows < (len(rows) if num_tokens is None else num_tokens)
    bias = _additive((rows[:, None] >= rows) & real if mask is None else np.asarray(mask))
    positions = rows if position_ids is None else np.asarray(position_ids)

    x = np.asarray(weights["embed_tokens.weight"], dtype=np.float64)[list(input_ids)]
    states = [x]
    for index in range(config["num_hidden_layers"]):
        prefix = f"layers.{index}."
        layer = {k.removeprefix(prefix): v.astype(np.float64) for k, v in weights.items() if k.startswith(prefix)}
        x = x + _attention(config, layer, _norm(config, layer["input_layernorm.weight"], x), bias, positions)
        x = x + _mlp(layer, _norm(config, layer["post_attention_layernorm.weight"], x))
        states.append(x)
    states[-1] = _norm(config, weights["norm.weight"], x)
    return states


def flux2_klein(config: Config, weights: Weights, input_ids: Sequence[int], pad_token_id: int) -> Array:
    """What FLUX.2 klein is given for a templated prompt: (512, 3*D), padding rows and all."""
    padded = [*input_ids, *[pad_token_id] * (512 - len(input_ids))]
    states = hidden_states(config, weights, padded, num_tokens=len(input_ids))
    return np.concatenate([states[9], states[18], states[27]], axis=-1)


def z_image(config: Config, weights: Weights, input_ids: Sequence[int]) -> Array:
    """What Z-Image is given for a templated prompt: (L, D), real rows alone."""
    return hidden_states(config, weights, input_ids)[-2]


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """The largest deviation in a row as a share of the largest number in that row, of the worst row.

    By row, so that one large row does not excuse a small one; by the row's largest number, so that a number that
    happens to be near zero does not count as infinitely wrong.
    """
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} against {expected.shape}"
    assert np.isfinite(actual).all()
    return float((np.abs(actual - expected).max(axis=-1) / np.abs(expected).max(axis=-1)).max(initial=0.0))


def _norm(config: Config, weight: NDArray[Any], x: Array) -> Array:
    return weight * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config["rms_norm_eps"])


def _linear(layer: Weights, name: str, x: Array) -> Array:
    return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0.0)


def _rope(config: Config, x: Array, positions: NDArray[Any]) -> Array:
    """Turn the pairs (x[j], x[j + d/2]) of (H, L, d), seen as complex numbers, by position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    angles = np.outer(positions, config["rope_theta"] ** (-np.arange(half) / half))  # (L, d/2)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _additive(mask: NDArray[Any]) -> Array:
    return np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)


def _attention(config: Config, layer: Weights, x: Array, bias: Array, positions: NDArray[Any]) -> Array:
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    sinks = layer.get("self_attn.sinks", np.full(heads, -np.inf))

    def split(name: str, count: int) -> Array:
        return _linear(layer, f"self_attn.{name}", x).reshape(len(x), count, head_dim).swapaxes(0, 1)  # (count, L, d)

    q = _rope(config, _norm(config, layer["self_attn.q_norm.weight"], split("q_proj", heads)), positions)
    k = _rope(config, _norm(config, layer["self_attn.k_norm.weight"], split("k_proj", kv_heads)), positions)
    v = split("v_proj", kv_heads)
    out = np.empty_like(q)
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[head] @ k[group].T / np.sqrt(head_dim) + bias
        scores = np.column_stack([scores, np.full(len(x), sinks[head])])  # (L, L+1): a last key that gives nothing
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[head] = shares[:, :-1] @ v[group] / shares.sum(axis=-1, keepdims=True)
    return _linear(layer, "self_attn.o_proj", out.swapaxes(0, 1).reshape(len(x), -1))


def _mlp(layer: Weights, x: Array) -> Array:
    gate = _linear(layer, "mlp.gate_proj", x)
    return _linear(layer, "mlp.down_proj", gate / (1 + np.exp(-gate)) * _linear(layer, "mlp.up_proj", x))
