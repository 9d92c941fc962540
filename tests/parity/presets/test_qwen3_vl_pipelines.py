"""Presets of the systems that read a Qwen3-VL, against the pipelines' own encoding."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import TextEncoder, get_preset
from encoder.errors import InvalidField
from encoder.options import ModelOptions
from tests.parity.presets.compare import OVERLONG, PROMPTS, assert_equal, assert_real_rows_equal, encode
from tests.parity.presets.conftest import save_qwen3_vl

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
pytest.importorskip("diffusers", minversion="0.42.1", reason="needs diffusers 0.42.1: make test-parity")

pytestmark = pytest.mark.parity

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def krea_2(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_tokenizer: Any) -> Any:
    return build("Krea2Pipeline", text_encoder=qwen3_vl_model.model, tokenizer=qwen3_vl_tokenizer)


@pytest.fixture(scope="module")
def ideogram_4(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_tokenizer: Any) -> Any:
    return build("Ideogram4Pipeline", text_encoder=qwen3_vl_model.model, tokenizer=qwen3_vl_tokenizer)


@pytest.fixture(scope="module")
def nucleus_image(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_processor: Any) -> Any:
    return build("NucleusMoEImagePipeline", text_encoder=qwen3_vl_model, processor=qwen3_vl_processor)


@pytest.fixture(scope="module")
def prx_pixel(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_tokenizer: Any) -> Any:
    pytest.importorskip("ftfy", reason="PRX Pixel's pipeline needs ftfy")
    return build("PRXPixelPipeline", text_encoder=qwen3_vl_model.model.language_model, tokenizer=qwen3_vl_tokenizer)


@pytest.fixture(scope="module")
def fibo_2(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_processor: Any) -> Any:
    return build("BriaFibo2Pipeline", text_encoder=qwen3_vl_model, processor=qwen3_vl_processor)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_krea_2_equals_the_pipelines(qwen3_vl: TextEncoder, krea_2: Any, prompts: list[str]) -> None:
    """The rows before and behind the padding, at the same places; the transformer masks the padding."""
    theirs, their_mask = krea_2.encode_prompt(prompts)
    ours, mask = encode(qwen3_vl, prompts, "krea-2")

    assert ours.shape == theirs.shape == (len(prompts), 512, 12, 16)
    np.testing.assert_array_equal(mask, their_mask)
    assert_real_rows_equal(ours, mask, theirs, their_mask)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_ideogram_4_equals_the_pipelines(qwen3_vl: TextEncoder, ideogram_4: Any, prompts: list[str]) -> None:
    """Real rows: the pipeline pads with zeros on the left, ours is not padded but to the longest on the right."""
    window = 100  # 2048 would be more zeros
    theirs, _, _, indicator = ideogram_4.encode_prompt(prompts, 1, 1, window, CPU)
    their_mask = indicator[:, :window] == 3  # LLM_TOKEN_INDICATOR
    ours, mask = encode(qwen3_vl, prompts, "ideogram-4")

    assert theirs.shape[-1] == ours.shape[-1] == 13 * 16
    assert_real_rows_equal(ours, mask, theirs[:, :window], their_mask)


def test_ideogram_4_refuses_what_the_pipeline_refuses(qwen3_vl: TextEncoder, ideogram_4: Any) -> None:
    """Both count the template's tokens, and neither cuts."""
    preset = get_preset("ideogram-4")
    [prompt] = qwen3_vl.tokenize(["a cat"], preset)
    fits = len(prompt.input_ids)
    ideogram_4.encode_prompt("a cat", 1, 1, fits, CPU)
    qwen3_vl.tokenize(["a cat"], replace(preset, max_sequence_length=fits))

    assert preset.max_sequence_length == 2048
    with pytest.raises(ValueError, match="exceeds max_sequence_length"):
        ideogram_4.encode_prompt("a cat", 1, 1, fits - 1, CPU)
    with pytest.raises(InvalidField, match="ideogram-4 refuses"):
        qwen3_vl.tokenize(["a cat"], replace(preset, max_sequence_length=fits - 1))


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="long")])
@pytest.mark.parametrize("window", [1024, 104])  # a multiple of 8, or the pipeline refuses
def test_nucleus_image_equals_the_pipelines(
    qwen3_vl: TextEncoder, nucleus_image: Any, prompts: list[str], window: int
) -> None:
    """Real rows and the mask, cut or not; the transformer masks the padding. Nothing padded is no mask."""
    preset = get_preset("nucleus-image")
    theirs, their_mask = nucleus_image.encode_prompt(prompts, max_sequence_length=window)
    their_mask = torch.ones(theirs.shape[:2]) if their_mask is None else their_mask
    ours, mask = encode(qwen3_vl, prompts, replace(preset, max_sequence_length=window))

    assert preset.max_sequence_length == nucleus_image.default_max_sequence_length == 1024
    np.testing.assert_array_equal(mask, their_mask)
    assert_real_rows_equal(ours, mask, theirs, their_mask)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_prx_pixel_equals_the_pipelines(qwen3_vl: TextEncoder, prx_pixel: Any, prompts: list[str]) -> None:
    """Real rows and the mask; the transformer masks the padding, and the whole of an empty prompt."""
    clean = pytest.importorskip("diffusers.pipelines.prx.pipeline_prx_pixel")._basic_clean
    theirs, their_mask, _, _ = prx_pixel.encode_prompt(prompts, do_classifier_free_guidance=False)
    ours, mask = encode(qwen3_vl, [clean(prompt) for prompt in prompts], "prx-pixel")

    assert ours.shape == theirs.shape == (len(prompts), 256, 16)
    np.testing.assert_array_equal(mask, their_mask)
    assert_real_rows_equal(ours, mask, theirs, their_mask)


CAPTIONS = ['{"short_description":"a 狐狸 🦊","objects":[{"description":"a fox"}]}', "{}"]


@pytest.mark.parametrize(
    "prompts", [*PROMPTS, pytest.param(CAPTIONS, id="captions"), pytest.param(OVERLONG, id="longer-than-the-window")]
)
def test_fibo_2_equals_the_pipelines(
    qwen3_vl: TextEncoder, fibo_2: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    """Six bundles of scaled hidden states, of real rows; the transformer masks the padding."""
    preset = get_preset("fibo-2")
    assert preset.max_sequence_length == fibo_2.tokenizer_max_length
    monkeypatch.setattr(fibo_2, "tokenizer_max_length", 200)
    theirs, their_mask = fibo_2.encode_prompt(prompts)
    their_mask = torch.ones(theirs.shape[0], theirs.shape[2]) if their_mask is None else their_mask
    ours, mask = encode(qwen3_vl, prompts, replace(preset, max_sequence_length=200))

    assert ours.shape == theirs.shape and ours.shape[1::2] == (6, 3 * 16)
    np.testing.assert_array_equal(mask, their_mask)
    assert_real_rows_equal(ours.swapaxes(1, 2), mask, theirs.swapaxes(1, 2), their_mask)


def test_fibo_2s_negative_prompt_is_the_pipelines() -> None:
    """The caption of an empty image, not an empty string."""
    pipeline = pytest.importorskip("diffusers.pipelines.bria_fibo2.pipeline_bria_fibo2")

    assert get_preset("fibo-2").negative_prompt == pipeline.DEFAULT_NEGATIVE_PROMPT


FOXES = [" fox" * words for words in (71, 72, 73, 90, 92, 93)]  # 79, 80, 81, 98, 100, 101 tokens


@pytest.mark.parametrize("window", [8192, 100])
@pytest.mark.parametrize(
    "prompts", [*PROMPTS, pytest.param(FOXES, id="around-the-edges"), pytest.param(OVERLONG, id="long")]
)
def test_flux3_equals_the_pipelines(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_processor: Any, prompts: list[str], window: int
) -> None:
    """Every row, since the transformer sees the padding; each prompt is a call of its own there."""
    encoders = pytest.importorskip("diffusers.modular_pipelines.flux3.encoders")
    step = encoders.Flux3TextEncoderStep()
    preset = get_preset("flux3")
    ours = qwen3_vl.encode(prompts, replace(preset, max_sequence_length=window), "float32")

    assert (step.pad_multiple, preset.max_sequence_length) == (preset.pad_to_multiple_of, 8192)
    for prompt, our in zip(prompts, ours, strict=True):
        theirs = step._get_qwen3_vl_prompt_embeds(
            qwen3_vl_model, qwen3_vl_processor, prompt, max_sequence_length=window, pad_multiple=step.pad_multiple
        )
        assert_equal(our.hidden_states[None], theirs)


@pytest.fixture(scope="module")
def minimax_h3(tmp_path_factory: pytest.TempPathFactory, qwen3_tokenizer: Path, qwen3_vl_processor: Any) -> Any:
    """The step around a model just deep enough, and the folder of that model."""
    encoders = pytest.importorskip("diffusers.modular_pipelines.minimax_h3.encoders")
    folder = tmp_path_factory.mktemp("minimax-h3")
    pipeline = encoders.MiniMaxH3TextEncoderStep().init_pipeline()
    pipeline.update_components(
        text_encoder=save_qwen3_vl(folder, 51, qwen3_tokenizer),
        tokenizer=qwen3_vl_processor.tokenizer,
        processor=qwen3_vl_processor,
    )
    return pipeline, TextEncoder.open(ModelOptions(str(folder), compute_dtype="float32"))


@pytest.mark.parametrize("prompts", PROMPTS[1:-1])
def test_minimax_h3_equals_the_pipelines(minimax_h3: Any, prompts: list[str]) -> None:
    """The prompt alone, all of it, after 50 layers."""
    pipeline, text_encoder = minimax_h3
    theirs = pipeline(prompt=prompts[0], output="prompt_embeds")
    ours, mask = encode(text_encoder, prompts, "minimax-h3")

    assert mask.all()
    assert_equal(ours, theirs)


def test_minimax_h3_gives_an_empty_prompt_one_token(minimax_h3: Any) -> None:
    """The padding token, as ComfyUI does: the pipeline's model cannot take a sequence of none."""
    pipeline, text_encoder = minimax_h3
    with pytest.raises(RuntimeError, match="0 elements"):
        pipeline(prompt="", output="prompt_embeds")
    ours, mask = encode(text_encoder, [""], "minimax-h3")

    assert mask.tolist() == [[True]]
    assert_equal(ours, pipeline(prompt="<|endoftext|>", output="prompt_embeds"))


def test_minimax_h3_has_no_norm_in_a_checkpoint_cut_to_50_layers() -> None:
    """Its last hidden state is normed there, and the pipeline refuses it; its last layer is what is wanted."""
    assert get_preset("minimax-h3").taps(50) == get_preset("minimax-h3").taps(64)
