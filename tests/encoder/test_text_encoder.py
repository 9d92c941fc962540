"""Steps 1 to 5 composed, prompts in, prompt embeds out, against the float64 reference on a real small checkpoint."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray

from encoder import EncoderError, Engine, InvalidField, ModelFailure, Preset, PromptEmbeds, TextEncoder, get_preset
from encoder.options import ModelOptions
from encoder.pipeline.selection import select
from encoder.types import DType, Job
from tests.checkpoints import write_checkpoint, write_json
from tests.reference import Weights, flux2_klein, hidden_states, relative_error, z_image

# float32 rounds at 6e-8; 28 layers of random weights amplify that to some 1e-5 here; the angles of RoPE in
# row 511 are rounded at 3e-5.
CLOSE = 5e-5
# The same numbers, summed in another order because the batch has another shape: up to 2e-6 here.
SAME = 1e-5

KLEIN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SHORT_KLEIN = replace(get_preset("flux2-klein"), max_sequence_length=64)  # for what does not depend on the window
PROMPTS = {
    "short": "a cat",
    "empty": "",
    "not-ascii": "\n 狐狸 🦊 é",
    "longer-than-the-window": "a red fox in deep snow, " * 40,
}


class Subject(NamedTuple):
    """A loaded checkpoint, and what the reference needs to know of it."""

    text_encoder: TextEncoder
    config: dict[str, Any]
    weights: Weights
    tokenizer: tokenizers.Tokenizer
    pad_token_id: int

    def read(self, template: str, prompt: str) -> list[int]:
        """The tokens of a prompt in its template, cut to 512, without our tokenizer module."""
        ids: list[int] = self.tokenizer.encode(template.format(prompt)).ids
        return ids[:512]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    weights = write_checkpoint(
        folder, num_hidden_layers=28, hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=10
    )
    text_encoder = TextEncoder.open(ModelOptions(str(folder), compute_dtype="float32"))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pad_token_id = tokenizer.token_to_id("<|endoftext|>")
    return Subject(text_encoder, asdict(text_encoder.config), weights, tokenizer, pad_token_id)


@pytest.fixture
def text_encoder(subject: Subject) -> TextEncoder:
    return subject.text_encoder


def expected_klein(subject: Subject, prompt: str) -> NDArray[np.float64]:
    return flux2_klein(subject.config, subject.weights, subject.read(KLEIN, prompt), subject.pad_token_id)


def expected_z_image(subject: Subject, prompt: str) -> NDArray[np.float64]:
    return z_image(subject.config, subject.weights, subject.read(CHAT, prompt))


def expected_ollama_klein(subject: Subject, prompt: str) -> NDArray[np.float64]:
    return flux2_klein(subject.config, subject.weights, subject.read(CHAT, prompt), subject.pad_token_id)


def expected_ollama_z_image(subject: Subject, prompt: str) -> NDArray[np.float64]:
    ids = subject.read(CHAT, prompt)
    padded = [*ids, *[subject.pad_token_id] * (512 - len(ids))]
    return hidden_states(subject.config, subject.weights, padded, num_tokens=len(ids))[-1]


def expected_last_hidden_state(subject: Subject, prompt: str) -> NDArray[np.float64]:
    return hidden_states(subject.config, subject.weights, subject.read("{}", prompt))[-1]


@pytest.mark.parametrize("place", ["folder", "--tokenizer"])
def test_padding_rows_are_the_presets_whatever_the_checkpoint_names(tmp_path: Path, place: str) -> None:
    """Fine-tuning tools write another padding token, with which FLUX.2 klein was not trained."""
    for name, pad_token in (("plain", "<|endoftext|>"), ("tuned", "<|vision_pad|>")):
        write_checkpoint(tmp_path / name)
        write_json(tmp_path / name / "tokenizer_config.json", {"pad_token": pad_token})
    model = str(tmp_path / ("tuned" if place == "folder" else "plain"))
    tuned = ModelOptions(model, tokenizer=str(tmp_path / "tuned") if place == "--tokenizer" else None)
    live = Preset(name="x", description="", source="", layers=(0,), padding="max_length", padding_rows="live")

    expected, found, other = (
        TextEncoder.open(options).encode(["a cat"], preset, "float32")[0].hidden_states
        for options, preset in (
            (ModelOptions(str(tmp_path / "plain")), live),
            (tuned, live),
            (tuned, replace(live, pad_token="<|vision_pad|>")),
        )
    )

    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(other[:5], expected[:5])
    assert (other[5:] != expected[5:]).any(axis=-1).all()


EXPECTED: dict[str, Callable[[Subject, str], NDArray[np.float64]]] = {
    "flux2-klein": expected_klein,
    "z-image": expected_z_image,
    "ollama/flux2-klein": expected_ollama_klein,
    "ollama/z-image": expected_ollama_z_image,
    "last-hidden-state": expected_last_hidden_state,
}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("flux2-klein", "short"),
        ("flux2-klein", "longer-than-the-window"),
        ("z-image", "short"),
        ("z-image", "empty"),
        ("z-image", "not-ascii"),
        ("ollama/flux2-klein", "not-ascii"),
        ("ollama/z-image", "short"),
        ("last-hidden-state", "not-ascii"),
    ],
)
def test_preset_equals_the_reference(subject: Subject, name: str, prompt: str) -> None:
    """Template, truncation, layers, norm, feature order and padding rows together are what a system was trained on."""
    [embeds] = subject.text_encoder.encode([PROMPTS[prompt]], get_preset(name), "float32")

    assert relative_error(embeds.hidden_states, EXPECTED[name](subject, PROMPTS[prompt])) < CLOSE


def test_truncation_cuts_the_end_of_the_template_too(subject: Subject) -> None:
    """The reference pipelines cut the templated string, so a long prompt loses the assistant's turn."""
    long = PROMPTS["longer-than-the-window"]
    [klein] = subject.text_encoder.encode([long], get_preset("flux2-klein"), "float32")
    [tokenized] = subject.text_encoder.tokenize([long], get_preset("flux2-klein"))

    assert tokenized.truncated
    assert klein.attention_mask.shape == (512,) and klein.attention_mask.all()
    assert tokenized.input_ids == tuple(subject.read(KLEIN, long))
    assert subject.tokenizer.token_to_id("<|im_end|>") not in tokenized.input_ids


def test_window_of_a_request_replaces_the_presets(subject: Subject) -> None:
    """A frontend that knows its own window need not pay for 512 rows."""
    [embeds] = subject.text_encoder.encode(["a cat"], SHORT_KLEIN, "float32")
    ids = subject.read(KLEIN, "a cat")
    padded = [*ids, *[subject.pad_token_id] * (64 - len(ids))]
    states = hidden_states(subject.config, subject.weights, padded, num_tokens=len(ids))

    assert relative_error(embeds.hidden_states, np.concatenate([states[9], states[18], states[27]], axis=-1)) < CLOSE


def test_batch_neighbours_leave_a_prompt_unchanged(text_encoder: TextEncoder) -> None:
    """A caller gets the same embeds whoever shares the batch: other lengths, other presets, other layers."""
    jobs = mixed_jobs(text_encoder)
    together = encode_jobs(text_encoder, jobs)
    alone = [encode_jobs(text_encoder, [job])[0] for job in jobs]

    for one, other in zip(alone, together, strict=True):
        assert relative_error(other.hidden_states, one.hidden_states) < SAME
        assert np.array_equal(other.attention_mask, one.attention_mask)


def test_place_in_a_batch_does_not_matter(text_encoder: TextEncoder) -> None:
    """Results come back in the order of their prompts, whatever it is."""
    jobs = mixed_jobs(text_encoder)
    shuffled = random.Random(0).sample(jobs, len(jobs))
    first = dict(zip(jobs, encode_jobs(text_encoder, jobs), strict=True))

    for job, embeds in zip(shuffled, encode_jobs(text_encoder, shuffled), strict=True):
        assert relative_error(embeds.hidden_states, first[job].hidden_states) < SAME


def mixed_jobs(text_encoder: TextEncoder) -> list[Job]:
    """Prompts of one token to a full window, under presets that cut padding rows and presets that deliver them."""
    names = ("z-image", "flux2-klein", "last-hidden-state", "ollama/z-image")
    presets = [replace(get_preset(name), max_sequence_length=144) for name in names]  # 512 would only take longer
    prompts = ["a", "a photo of a red fox", "tiles " * 12, PROMPTS["longer-than-the-window"]]
    return [
        job
        for preset in presets
        for job in text_encoder.plan(text_encoder.tokenize(prompts, preset), preset, "float32")
    ]


def encode_jobs(text_encoder: TextEncoder, jobs: Sequence[Job]) -> list[PromptEmbeds]:
    results = text_encoder.run(jobs)
    assert not any(isinstance(result, EncoderError) for result in results)
    return [result for result in results if isinstance(result, PromptEmbeds)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_and_hidden_states_name_the_same_bytes(text_encoder: TextEncoder, dtype: DType) -> None:
    """Layer k is hidden state k+1; mixing up the two numberings is the classic mistake."""
    [by_layer] = text_encoder.encode(["a cat"], replace(SHORT_KLEIN, layers=(8, 17, 26)), dtype)
    [by_state] = text_encoder.encode(["a cat"], replace(SHORT_KLEIN, layers=None, hidden_states=(9, 18, 27)), dtype)

    assert by_layer.hidden_states.tobytes() == by_state.hidden_states.tobytes()


def test_negative_indices_count_from_the_end(subject: Subject) -> None:
    """-1 is the last layer in one numbering and the normed last state in the other."""
    base = get_preset("last-hidden-state")
    states = hidden_states(subject.config, subject.weights, subject.read("{}", "a cat"))

    def encode(**taps: tuple[int, ...] | None) -> NDArray[np.generic]:
        [embeds] = subject.text_encoder.encode(["a cat"], replace(base, **({"hidden_states": None} | taps)), "float32")
        return embeds.hidden_states

    assert relative_error(encode(hidden_states=(-1,)), states[28]) < CLOSE
    assert relative_error(encode(hidden_states=(-2,)), states[27]) < CLOSE
    assert relative_error(encode(layers=(-2,)), states[27]) < CLOSE
    assert relative_error(encode(hidden_states=(-29,)), states[0]) < CLOSE
    last = encode(layers=(-1,))
    assert relative_error(last / rms(last) * subject.weights["norm.weight"], states[28]) < CLOSE


def rms(x: NDArray[Any]) -> NDArray[Any]:
    root: NDArray[Any] = np.sqrt(np.square(x).mean(axis=-1, keepdims=True))
    return root


def test_flux2_klein_runs_27_layers(text_encoder: TextEncoder) -> None:
    """The nine layers after the deepest tap would cost a third more."""
    before = text_encoder.layers_run
    text_encoder.encode(["a cat", "a dog"], SHORT_KLEIN, "float32")

    assert text_encoder.layers_run - before == 27


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_on_a_cpu_batches_do_not_overlap(tmp_path: Path, compute_dtype: str) -> None:
    """There is no second device that would compute one batch while the CPU collects another."""
    assert not TextEncoder.open(ModelOptions("demo", cache_dir=tmp_path, compute_dtype=compute_dtype)).overlaps


def test_results_of_the_synchronous_encoder_share_no_memory(
    text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU small results of a batch share memory, and the caller may keep any of them."""
    monkeypatch.setattr("encoder.text_encoder.select", partial(select, grouped=True))
    preset = get_preset("last-hidden-state")
    jobs = text_encoder.plan(text_encoder.tokenize(["a cat", "a dog"], preset), preset, "float32")
    together, _ = text_encoder.collect(text_encoder.dispatch(text_encoder.begin(jobs)))

    assert [embeds.shares_memory for embeds in together if isinstance(embeds, PromptEmbeds)] == [True, True]
    own = text_encoder.encode(["a cat", "a dog"], preset, "float32")
    assert [embeds.shares_memory for embeds in own] == [False, False]


def test_stack_holds_what_concat_joins(text_encoder: TextEncoder) -> None:
    """Features are layer-major: all of the first layer, then all of the next."""
    [joined] = text_encoder.encode(["a cat"], SHORT_KLEIN, "float32")
    [stacked] = text_encoder.encode(["a cat"], replace(SHORT_KLEIN, combine="stack"), "float32")

    assert joined.hidden_states.shape == (64, 144) and stacked.hidden_states.shape == (3, 64, 48)
    assert np.array_equal(np.concatenate(list(stacked.hidden_states), axis=-1), joined.hidden_states)


@pytest.mark.parametrize("combine", ["concat", "stack"])
def test_dropped_rows_are_missing_in_front(text_encoder: TextEncoder, combine: Any) -> None:
    """Some systems drop their system turn, after the model has seen it."""
    whole_preset = replace(SHORT_KLEIN, combine=combine)
    [whole] = text_encoder.encode(["a cat"], whole_preset, "float32")
    [dropped] = text_encoder.encode(["a cat"], replace(whole_preset, dropped_rows=3), "float32")

    assert np.array_equal(dropped.hidden_states, whole.hidden_states[..., 3:, :])
    assert np.array_equal(dropped.attention_mask, whole.attention_mask[3:])


@pytest.mark.parametrize("combine", ["concat", "stack"])
def test_zero_rows_are_zeros_after_the_real_ones(text_encoder: TextEncoder, combine: Any) -> None:
    """Some systems multiply by the mask; the shape is part of their contract, the model's padding rows are not."""
    preset = replace(SHORT_KLEIN, combine=combine)
    [live] = text_encoder.encode(["a cat"], preset, "float32")
    [zero] = text_encoder.encode(["a cat"], replace(preset, padding_rows="zero"), "float32")
    real = int(live.attention_mask.sum())

    assert zero.hidden_states.shape == live.hidden_states.shape
    assert not zero.hidden_states[..., real:, :].any() and live.hidden_states[..., real:, :].any()
    # Computed in another shape: the padding rows do not run.
    assert relative_error(zero.hidden_states[..., :real, :], live.hidden_states[..., :real, :]) < SAME
    assert np.array_equal(zero.attention_mask, live.attention_mask)


def test_padding_to_the_longest_prompt_delivers_equal_lengths(text_encoder: TextEncoder) -> None:
    """A batch of one request becomes one tensor, whose length follows from the request and nothing else."""
    preset = replace(get_preset("z-image"), padding="longest", padding_rows="live")
    short, long = text_encoder.encode(["a cat", "a cat on a sofa"], preset, "float32")

    assert short.hidden_states.shape == long.hidden_states.shape == (len(long.attention_mask), 48)
    assert long.attention_mask.all() and not short.attention_mask.all()


def test_attention_mask_marks_the_real_tokens(subject: Subject) -> None:
    """Whoever pads further must know where a prompt ends."""
    [klein] = subject.text_encoder.encode(["a cat"], SHORT_KLEIN, "float32")
    [z_image] = subject.text_encoder.encode(["a cat"], get_preset("z-image"), "float32")

    assert klein.attention_mask.tolist() == [row < len(subject.read(KLEIN, "a cat")) for row in range(64)]
    assert z_image.attention_mask.tolist() == [True] * len(subject.read(CHAT, "a cat"))


def test_bare_empty_prompt_has_no_rows(text_encoder: TextEncoder) -> None:
    """Without a template there is nothing to encode, which is a result and not an error."""
    empty, other = text_encoder.encode(["", "a cat"], get_preset("last-hidden-state"), "float32")

    assert empty.hidden_states.shape == (0, 48) and empty.attention_mask.shape == (0,)
    assert other.hidden_states.shape == (5, 48)


def test_results_are_bfloat16_unless_asked_otherwise(text_encoder: TextEncoder) -> None:
    """The HTTP API and the Engine answer in bfloat16: the same call gives the same numbers everywhere."""
    [embeds] = text_encoder.encode(["a cat"], SHORT_KLEIN)

    assert embeds.dtype == signature(Engine.encode).parameters["dtype"].default == "bfloat16"


def test_bfloat16_is_float32_rounded_to_nearest_even(text_encoder: TextEncoder) -> None:
    """The result is rounded once, at the end, and not truncated."""
    [full] = text_encoder.encode(["a cat"], SHORT_KLEIN, "float32")
    [half] = text_encoder.encode(["a cat"], SHORT_KLEIN, "bfloat16")
    bits = full.hidden_states.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

    assert half.dtype == "bfloat16" and half.hidden_states.dtype == np.uint16
    assert np.array_equal(half.hidden_states, rounded)


def test_float16_is_float32_rounded_by_numpy(text_encoder: TextEncoder) -> None:
    """What MLX calls float16 is IEEE's."""
    [full] = text_encoder.encode(["a cat"], SHORT_KLEIN, "float32")
    [half] = text_encoder.encode(["a cat"], SHORT_KLEIN, "float16")

    assert half.hidden_states.dtype == np.float16
    assert np.array_equal(half.hidden_states, full.hidden_states.astype(np.float16))


@pytest.fixture
def damaged(tmp_path: Path) -> TextEncoder:
    """An encoder in which the letter x is too large for float16, and the letter y is no number."""
    write_checkpoint(tmp_path, num_hidden_layers=2, hidden_size=16)
    encoder = TextEncoder.open(ModelOptions(str(tmp_path), compute_dtype="float32"))
    [x], [y] = (encoder.checkpoint.tokenizer.tokenize(letter, max_length=1)[0] for letter in "xy")
    table = np.array(encoder.model.embed_tokens.weight)
    table[x], table[y] = 1e5, np.nan
    encoder.model.embed_tokens.weight = mx.array(table)
    return encoder


EMBEDDINGS: Preset = replace(get_preset("last-hidden-state"), hidden_states=(0,))


def test_overflow_in_float16_is_the_requests_mistake(damaged: TextEncoder) -> None:
    """Qwen3's hidden states can exceed float16, and infinity would become a black picture much later."""
    with pytest.raises(InvalidField, match="overflow float16") as caught:
        damaged.encode(["axa"], EMBEDDINGS, "float16")

    assert caught.value.field == "dtype"
    [as_bfloat16] = damaged.encode(["axa"], EMBEDDINGS, "bfloat16")
    assert as_bfloat16.hidden_states.shape == (3, 16)


def test_nan_is_a_failure_of_the_model(damaged: TextEncoder) -> None:
    """NaN would spoil a picture silently."""
    with pytest.raises(ModelFailure, match="NaN"):
        damaged.encode(["aya"], get_preset("last-hidden-state"))


def test_failure_of_one_prompt_leaves_its_neighbours_alone(damaged: TextEncoder) -> None:
    """A prompt that shares a batch with a bad one gets the same result as without it."""
    last = get_preset("last-hidden-state")
    jobs = [
        *damaged.plan(damaged.tokenize(["aya", "bcd"], last), last, "float32"),
        *damaged.plan(damaged.tokenize(["axa", "efg"], EMBEDDINGS), EMBEDDINGS, "float16"),
    ]
    nan, first, overflow, second = damaged.run(jobs)

    assert isinstance(nan, ModelFailure) and isinstance(overflow, InvalidField)
    assert isinstance(first, PromptEmbeds) and isinstance(second, PromptEmbeds)
    [alone] = damaged.encode(["bcd"], last, "float32")
    assert relative_error(first.hidden_states, alone.hidden_states) < SAME


def test_preset_whose_layers_do_not_exist_is_refused(damaged: TextEncoder) -> None:
    """FLUX.2 klein needs 27 layers; this checkpoint has two."""
    with pytest.raises(InvalidField, match="2 decoder layers"):
        damaged.encode(["a cat"], get_preset("flux2-klein"))
