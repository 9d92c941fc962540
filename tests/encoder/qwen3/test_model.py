"""The transformer against the float64 reference, layer by layer, and against itself where two ways must agree."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from encoder.presets.built_in import FLUX2_KLEIN
from encoder.presets.preset import Preset
from encoder.qwen3.config import Qwen3Config
from encoder.qwen3.model import DecoderLayer, Qwen3, apply_rope, attend, repeat_kv
from encoder.qwen3.rope import Rope
from encoder.types import Mask, Tap
from tests.reference import Weights, hidden_states, relative_error

# float32 rounds at 6e-8; sums of some forty products and a handful of layers leave up to 3e-6 here, while a wrong eps,
# theta, head grouping or norm weight is off by 1e-3 at the least.
CLOSE = 1e-5

CONFIG = Qwen3Config(
    hidden_size=40,  # so that hidden_size / num_attention_heads is not head_dim
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    max_position_embeddings=128,
)
INPUT_IDS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5, 63]]
LENGTH = len(INPUT_IDS[0])


def build(config: Qwen3Config) -> tuple[Qwen3, Weights]:
    """A model with random weights, none of which is neutral, and the same weights for the reference."""
    model = Qwen3(config)
    random = np.random.default_rng(0)
    weights = {name: random_weight(random, name, array.shape) for name, array in tree_flatten(model.parameters())}
    model.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    return model, weights


def random_weight(random: np.random.Generator, name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    if name.endswith("norm.weight"):
        return random.uniform(0.5, 2.0, shape).astype(np.float32)  # ones would hide a norm that is left out
    return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def all_taps(model: Qwen3) -> list[Tap]:
    """Hugging Face's N+1 hidden states."""
    depth = len(model.layers)
    return [*(Tap(k, normed=False) for k in range(depth)), Tap(depth, normed=True)]


def run(model: Qwen3, input_ids: Sequence[Sequence[int]] = INPUT_IDS, **inputs: Any) -> NDArray[np.float32]:
    """Every hidden state, (N+1, B, L, D)."""
    return np.stack([np.array(x) for x in model.hidden_states_at(all_taps(model), mx.array(input_ids), **inputs)])


def expect(
    config: Qwen3Config, weights: Weights, input_ids: Sequence[Sequence[int]] = INPUT_IDS, **inputs: Any
) -> NDArray[np.float64]:
    """The same from the reference."""
    rows = [hidden_states(asdict(config), weights, row, **inputs) for row in input_ids]
    return np.stack([np.stack(row) for row in rows], axis=1)


@pytest.fixture(scope="module")
def model_and_weights() -> tuple[Qwen3, Weights]:
    return build(CONFIG)


@pytest.fixture(scope="module")
def model(model_and_weights: tuple[Qwen3, Weights]) -> Qwen3:
    return model_and_weights[0]


@pytest.fixture(scope="module")
def weights(model_and_weights: tuple[Qwen3, Weights]) -> Weights:
    return model_and_weights[1]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="grouped"),
        pytest.param(replace(CONFIG, num_attention_heads=8, num_key_value_heads=1), id="one-kv-head"),
        pytest.param(replace(CONFIG, num_attention_heads=6, num_key_value_heads=3), id="odd-kv-heads"),
        pytest.param(replace(CONFIG, num_attention_heads=4, num_key_value_heads=4), id="a-kv-head-each"),
        pytest.param(replace(CONFIG, head_dim=10), id="head-dim-from-hidden-size"),
        pytest.param(replace(CONFIG, head_dim=2), id="smallest-head-dim"),
        pytest.param(replace(CONFIG, head_dim=128, num_attention_heads=2, num_key_value_heads=1), id="real-head-dim"),
        pytest.param(replace(CONFIG, rms_norm_eps=1e-2), id="large-eps"),
        pytest.param(replace(CONFIG, rope_theta=10_000.0), id="default-theta"),
        pytest.param(replace(CONFIG, attention_bias=True), id="attention-bias"),
        pytest.param(replace(CONFIG, attention_sinks=True), id="attention-sinks"),
        pytest.param(replace(CONFIG, num_hidden_layers=1), id="one-layer"),
    ],
)
def test_every_hidden_state_equals_the_reference(config: Qwen3Config) -> None:
    """A checkpoint may have any dims; each layer is compared, so that errors cannot cancel."""
    model, weights = build(config)
    computed, expected = run(model), expect(config, weights)

    for k in range(config.num_hidden_layers + 1):
        assert relative_error(computed[k], expected[k]) < CLOSE, f"hidden state {k}"


def test_call_returns_the_last_hidden_state_after_the_norm(model: Qwen3, weights: Weights) -> None:
    """It is Hugging Face's last_hidden_state."""
    last = np.array(model(mx.array(INPUT_IDS)))

    assert relative_error(last, expect(CONFIG, weights)[-1]) < CLOSE


def test_last_layer_is_available_without_the_norm(model: Qwen3, weights: Weights) -> None:
    """`layers: [-1]` and `hidden_states: [-1]` differ by the final norm alone."""
    before, after = model.hidden_states_at([Tap(4, normed=False), Tap(4, normed=True)], mx.array(INPUT_IDS))
    rms = np.sqrt(np.square(np.array(before)).mean(axis=-1, keepdims=True) + CONFIG.rms_norm_eps)

    assert relative_error(np.array(after), np.array(before) / rms * weights["norm.weight"]) < CLOSE
    assert relative_error(np.array(before), np.array(after)) > 0.1


def test_taps_come_back_in_the_order_asked_for(model: Qwen3) -> None:
    """Feature order is part of a diffusion model's contract, and one state may be wanted twice."""
    third, first, again = model.hidden_states_at([Tap(3, False), Tap(1, False), Tap(3, False)], mx.array(INPUT_IDS))
    every = run(model)

    assert np.array_equal(np.array(third), every[3])
    assert np.array_equal(np.array(first), every[1])
    assert np.array_equal(np.array(again), every[3])


def random_mask() -> NDArray[np.bool_]:
    """Any pattern at all, in which each row sees itself."""
    return np.asarray(np.random.default_rng(1).random((LENGTH, LENGTH)) < 0.4) | np.eye(LENGTH, dtype=bool)


def random_bias() -> NDArray[np.float32]:
    """Scores that some keys gain or lose, and a few keys that are as good as hidden."""
    random = np.random.default_rng(2)
    bias = np.asarray(random.normal(0, 2, (LENGTH, LENGTH)), dtype=np.float32)
    return np.where(random_mask(), bias, np.float32(-1e9))


@pytest.mark.parametrize(
    ("mask", "same_for_reference"),
    [
        pytest.param("causal", np.tril(np.ones((LENGTH, LENGTH), dtype=bool)), id="causal"),
        pytest.param("none", np.ones((LENGTH, LENGTH), dtype=bool), id="none"),
        pytest.param(mx.array(random_mask()), random_mask(), id="bool"),
        pytest.param(mx.array(random_mask())[None, None], random_mask(), id="bool-with-batch-axes"),
        pytest.param(mx.array(random_bias()), random_bias(), id="additive"),
    ],
)
def test_mask_decides_which_rows_see_which(
    model: Qwen3, weights: Weights, mask: Mask, same_for_reference: NDArray[Any]
) -> None:
    """All mask modes mean what they say, in every layer."""
    computed, expected = run(model, mask=mask), expect(CONFIG, weights, mask=same_for_reference)

    assert relative_error(computed, expected) < CLOSE


@pytest.mark.parametrize("mask", ["causal", "none", "array"])
def test_attention_sinks_work_in_every_mask_mode(mask: str) -> None:
    """A sink takes its share of attention whatever the rows see."""
    config = replace(CONFIG, attention_sinks=True)
    sunk, weights = build(config)
    seen = {"causal": np.tril(np.ones((LENGTH, LENGTH), dtype=bool)), "none": np.ones((LENGTH, LENGTH), dtype=bool)}
    visible = seen.get(mask, random_mask())
    computed = run(sunk, mask=mx.array(visible) if mask == "array" else mask)

    assert relative_error(computed, expect(config, weights, mask=visible)) < CLOSE


def test_a_very_low_sink_is_no_sink(model: Qwen3) -> None:
    """The sink is a logit, so minus infinity leaves attention as it is."""
    sunk = Qwen3(replace(CONFIG, attention_sinks=True))
    sunk.load_weights(tree_flatten(model.parameters()), strict=False)
    for layer in sunk.layers:
        layer.self_attn.sinks = mx.full((CONFIG.num_attention_heads,), -1e9)

    assert relative_error(run(sunk), run(model)) < CLOSE


def test_default_positions_are_a_plain_range(model: Qwen3) -> None:
    """Explicit positions take another path through RoPE, which must not be another rotation."""
    explicit = mx.broadcast_to(mx.arange(LENGTH), (2, LENGTH))

    assert relative_error(run(model, position_ids=explicit), run(model)) < CLOSE


def test_shifting_all_positions_changes_nothing(model: Qwen3) -> None:
    """RoPE is relative, so left padding that shifts a prompt is harmless."""
    shifted = mx.broadcast_to(mx.arange(LENGTH) + 37, (2, LENGTH))

    # Angles up to 53 radians are rounded at 2e-6 in float32, which each layer adds to.
    assert relative_error(run(model, position_ids=shifted), run(model)) < 5e-5


@pytest.mark.parametrize(
    "position_ids",
    [
        pytest.param([*range(10), *[1] * 7], id="repeated"),
        pytest.param([0, 0, 0, *range(14)], id="left-padded"),
        pytest.param([*range(0, 5), *range(100, 112)], id="gap"),
        pytest.param(list(range(LENGTH))[::-1], id="descending"),
    ],
)
def test_explicit_positions_equal_the_reference(model: Qwen3, weights: Weights, position_ids: list[int]) -> None:
    """Some systems give padding one position, or leave a gap."""
    computed = run(model, position_ids=mx.array([position_ids] * 2))

    assert relative_error(computed, expect(CONFIG, weights, position_ids=position_ids)) < CLOSE


def test_positions_may_differ_between_rows_of_a_batch(model: Qwen3, weights: Weights) -> None:
    """Every row of a batch has its own padding."""
    position_ids = [list(range(LENGTH)), [0, 0, *range(LENGTH - 2)]]
    computed = run(model, position_ids=mx.array(position_ids))

    for row, (ids, positions) in enumerate(zip(INPUT_IDS, position_ids, strict=True)):
        expected = expect(CONFIG, weights, [ids], position_ids=positions)
        assert relative_error(computed[:, row : row + 1], expected) < CLOSE


def test_inputs_embeds_replace_the_embedding_table(model: Qwen3) -> None:
    """Given the embeddings of token ids, the result is that of the token ids."""
    embeds = model.embed_tokens(mx.array(INPUT_IDS))
    from_embeds = model.hidden_states_at(all_taps(model), inputs_embeds=embeds)

    assert np.array_equal(np.stack([np.array(x) for x in from_embeds]), run(model))
    assert np.array_equal(np.array(model(inputs_embeds=embeds)), run(model)[-1])


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_of_input_ids_and_inputs_embeds_is_taken(model: Qwen3, both: bool) -> None:
    """With both, one would be ignored silently."""
    input_ids = mx.array(INPUT_IDS) if both else None
    inputs_embeds = mx.zeros((2, LENGTH, CONFIG.hidden_size)) if both else None

    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids, inputs_embeds=inputs_embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model.hidden_states_at([Tap(1, False)], input_ids, inputs_embeds=inputs_embeds)


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("head_dim", [2, 10, 128])
def test_apply_rope_turns_pairs_by_position_times_frequency(head_dim: int, explicit: bool) -> None:
    """Element j pairs with j + d/2 and turns by position * theta^(-2j/d); interleaved pairs are another model."""
    x = np.random.default_rng(3).standard_normal((2, 3, LENGTH, head_dim)).astype(np.float32)
    position_ids = mx.broadcast_to(mx.arange(LENGTH), (2, LENGTH)) if explicit else None
    rotated = np.array(apply_rope(mx.array(x), Rope(1e6, head_dim), position_ids))

    half = head_dim // 2
    for position in range(LENGTH):
        for j in range(half):
            angle = position * 1e6 ** (-2 * j / head_dim)
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            pair = x[:, :, position, [j, j + half]]
            # Angles up to 16 radians are rounded at 1e-6 in float32, and the numbers are below 5.
            np.testing.assert_allclose(rotated[:, :, position, [j, j + half]], pair @ turn.T, atol=1e-5)


@pytest.mark.parametrize("explicit", [True, False])
def test_apply_rope_keeps_the_dtype(explicit: bool) -> None:
    """The rotation is computed in float32, but attention goes on in the model's dtype."""
    position_ids = mx.arange(4)[None] if explicit else None

    assert apply_rope(mx.ones((1, 1, 4, 8), dtype=mx.bfloat16), Rope(1e6, 8), position_ids).dtype == mx.bfloat16


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 3), (4, 4)])
def test_expanding_key_value_heads_equals_grouping_them(heads: int, kv_heads: int) -> None:
    """`repeat_kv` is for paths that don't group by themselves, so it must group as attention does."""
    random = np.random.default_rng(4)
    q, k, v = (
        mx.array(random.standard_normal((2, count, LENGTH, 16)).astype(np.float32))
        for count in (heads, kv_heads, kv_heads)
    )
    grouped = attend(q, k, v, 0.25)
    expanded = attend(q, repeat_kv(k, heads // kv_heads), repeat_kv(v, heads // kv_heads), 0.25)

    np.testing.assert_allclose(np.array(expanded), np.array(grouped), atol=1e-6)  # averages of numbers below 5


def test_repeat_kv_gives_neighbouring_heads_the_same_key_value_head() -> None:
    """Heads 0 and 1 share key-value head 0; a tiled order would be another model."""
    x = mx.arange(3).reshape(1, 3, 1, 1)

    assert repeat_kv(x, 2).flatten().tolist() == [0, 0, 1, 1, 2, 2]


class CountedLayer:
    """A decoder layer that counts its calls."""

    def __init__(self, layer: DecoderLayer, index: int, calls: list[int]) -> None:
        self.layer, self.index, self.calls = layer, index, calls

    def __call__(self, x: mx.array, mask: Mask, position_ids: mx.array | None) -> mx.array:
        self.calls.append(self.index)
        return self.layer(x, mask, position_ids)


@pytest.mark.parametrize(
    ("preset", "layers_run"),
    [
        pytest.param(FLUX2_KLEIN, 27, id="flux2-klein"),
        pytest.param(replace(FLUX2_KLEIN, layers=None, hidden_states=(9, 18, 27)), 27, id="by-hidden-states"),
        pytest.param(replace(FLUX2_KLEIN, layers=(26, 8)), 27, id="deepest-first"),
        pytest.param(replace(FLUX2_KLEIN, layers=(-2,)), 35, id="last-but-one"),
        pytest.param(replace(FLUX2_KLEIN, layers=(-1,)), 36, id="last"),
        pytest.param(replace(FLUX2_KLEIN, layers=None, hidden_states=(0,)), 0, id="embedding-output"),
    ],
)
def test_no_layer_after_the_deepest_tap_runs(preset: Preset, layers_run: int) -> None:
    """FLUX.2 klein needs 27 of 36 layers; the other nine would cost a third more."""
    config = replace(CONFIG, num_hidden_layers=36)
    model, calls = Qwen3(config), list[int]()
    model.layers = [CountedLayer(layer, index, calls) for index, layer in enumerate(model.layers)]
    mx.eval(model.hidden_states_at(preset.taps(36), mx.array(INPUT_IDS)))

    assert calls == list(range(layers_run))
