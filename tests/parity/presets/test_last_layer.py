"""Presets that take the last layer of a Qwen3-VL, where the version of transformers decides whether it is normed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from encoder import Preset, TextEncoder, get_preset
from tests.parity.presets.compare import OVERLONG, PROMPTS, assert_equal, assert_real_rows_equal, encode, last_layer

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
pytest.importorskip("diffusers", minversion="0.42.1", reason="needs diffusers 0.42.1: make test-parity")

pytestmark = pytest.mark.parity

CPU = torch.device("cpu")
DESCRIBE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def dreamlite(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_tokenizer: Any) -> Any:
    return build("DreamLitePipeline", text_encoder=qwen3_vl_model, tokenizer=qwen3_vl_tokenizer)


@pytest.fixture(scope="module")
def joyimage_edit(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_tokenizer: Any) -> Any:
    return build("JoyImageEditPipeline", text_encoder=qwen3_vl_model, tokenizer=qwen3_vl_tokenizer)


@pytest.fixture(scope="module")
def joyimage_edit_plus(
    build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, qwen3_vl_processor: Any
) -> Any:
    return build(
        "JoyImageEditPlusPipeline",
        text_encoder=qwen3_vl_model,
        tokenizer=qwen3_vl_tokenizer,
        processor=qwen3_vl_processor,
    )


@pytest.fixture(scope="module")
def qwen_image_2_1(build: Callable[..., Any], qwen3_vl_model: Any, qwen3_vl_processor: Any) -> Any:
    return build("QwenImage21Pipeline", text_encoder=qwen3_vl_model, processor=qwen3_vl_processor)


@pytest.mark.parametrize("window", [200, 20])
@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_dreamlite_equals_the_pipelines(qwen3_vl: TextEncoder, dreamlite: Any, prompts: list[str], window: int) -> None:
    """Every row and the mask, with the mark that `__call__` puts before a positive prompt, as of transformers 5."""
    preset = get_preset("dreamlite")
    theirs, their_mask = dreamlite.encode_prompt(
        "generate", [f"[Generate]: {prompt}" for prompt in prompts], CPU, torch.float32, max_sequence_length=window
    )
    ours, mask = encode(qwen3_vl, prompts, replace(preset, max_sequence_length=window + 34))

    assert preset.max_sequence_length == 200 + 34
    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_equal(ours, theirs, mask)


@pytest.mark.parametrize("prompts", PROMPTS)
def test_dreamlite_negative_equals_the_pipelines(qwen3_vl: TextEncoder, dreamlite: Any, prompts: list[str]) -> None:
    """`__call__` encodes the negative prompt without the mark."""
    theirs, their_mask = dreamlite.encode_prompt("generate", prompts, CPU, torch.float32, max_sequence_length=200)
    ours, mask = encode(qwen3_vl, prompts, str(get_preset("dreamlite").negative_preset))

    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_equal(ours, theirs, mask)


@pytest.mark.parametrize(
    ("preset", "mark"), [("dreamlite-prenorm", "[Generate]: "), ("dreamlite-prenorm-negative", "")]
)
@pytest.mark.parametrize("prompts", PROMPTS)
def test_dreamlite_prenorm_equals_the_pipelines_before_transformers_5(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, dreamlite: Any, prompts: list[str], preset: str, mark: str
) -> None:
    """hidden_states[-1] was the last layer without the norm there."""
    theirs, their_mask = last_layer(
        qwen3_vl_model.model.language_model,
        lambda: dreamlite.encode_prompt("generate", [mark + prompt for prompt in prompts], CPU, torch.float32),
    )
    ours, mask = encode(qwen3_vl, prompts, preset)

    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_equal(ours, theirs, mask)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_joyimage_edit_equals_the_pipelines(
    qwen3_vl: TextEncoder, joyimage_edit: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    """Every row: the transformer sees the zeros that pad a batch."""
    preset = get_preset("joyimage-edit")
    assert preset.max_sequence_length == joyimage_edit.text_token_max_length + 34
    monkeypatch.setattr(joyimage_edit, "text_token_max_length", 200)
    theirs, their_mask = joyimage_edit._get_qwen_prompt_embeds(prompts)
    ours, mask = encode(qwen3_vl, prompts, replace(preset, max_sequence_length=200 + 34))

    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_equal(ours, theirs, mask)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="long")])
def test_joyimage_edit_plus_equals_the_pipelines(
    qwen3_vl: TextEncoder, joyimage_edit_plus: Any, prompts: list[str]
) -> None:
    """Every real row, in the turn that `__call__` writes around a prompt without images."""
    turns = [f"<|im_start|>user\n{prompt}<|im_end|>\n" for prompt in prompts]
    theirs, their_mask = joyimage_edit_plus.encode_prompt_multiple_images(turns, CPU)
    ours, mask = encode(qwen3_vl, prompts, "joyimage-edit-plus")

    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_real_rows_equal(ours, mask, theirs, their_mask)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="long")])
def test_qwen_image_2_1_equals_the_pipelines(qwen3_vl: TextEncoder, qwen_image_2_1: Any, prompts: list[str]) -> None:
    """Every row and the mask; the pipeline pads on the left to encode, and on the right to deliver. It never cuts."""
    theirs, their_mask, _ = qwen_image_2_1.encode_prompt(prompts)
    their_mask = torch.ones(theirs.shape[:2]) if their_mask is None else their_mask
    ours, mask = encode(qwen3_vl, prompts, "qwen-image-2.1")

    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_equal(ours, theirs, mask)


def of_the_model(model: Any, tokenizer: Any, text: str) -> Any:
    """last_hidden_state of a whole string: what systems without a pipeline in diffusers are compared with."""
    return model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state


BOOGU = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions. "
    "The instructions are as follows.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)
BOOGU_EMPTY = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)


@pytest.mark.parametrize("prompt", [*(prompt for case in PROMPTS for prompt in case.values[0]), OVERLONG[0]])
def test_boogu_equals_comfyui(qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompt: str) -> None:
    """All rows after the final norm; another system turn for a prompt that `strip` leaves empty."""
    text = (BOOGU if prompt.strip() else BOOGU_EMPTY).format(prompt)
    ours, _ = encode(qwen3_vl, [prompt], "boogu")

    assert_equal(ours, of_the_model(qwen3_vl_model, qwen3_vl_tokenizer, text))


def ollama(model: Any, tokenizer: Any, prompt: str) -> tuple[Any, ...]:
    """Hidden states of 512 rows, as Ollama's image generation pads and masks, for a template without <think>."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    states: tuple[Any, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return states


@pytest.mark.parametrize("prompt", ["", "a fox 🦊\n", OVERLONG[0]])
def test_ollamas_flux2_klein_and_z_image_have_no_think_block_and_all_rows(
    qwen3: TextEncoder, qwen3_model: Any, qwen3_tokenizer_of_transformers: Any, prompt: str
) -> None:
    """FLUX.2 klein otherwise as the reference; Z-Image after all layers and the norm."""
    states = ollama(qwen3_model, qwen3_tokenizer_of_transformers, prompt)
    klein, _ = encode(qwen3, [prompt], "ollama/flux2-klein")
    z_image, _ = encode(qwen3, [prompt], "ollama/z-image")

    assert_equal(klein, torch.cat([states[9], states[18], states[27]], dim=-1))
    assert_equal(z_image, states[-1])


def test_ollamas_presets_differ_from_the_references_only_where_ollama_does() -> None:
    """Whatever else changes in a reference preset changes in Ollama's."""

    def same(ollama: Preset, reference: Preset, *but: str) -> bool:
        kept = {name: getattr(reference, name) for name in (*but, "name", "description", "source", "aliases")}
        return replace(ollama, **kept) == reference

    assert same(get_preset("ollama/flux2-klein"), get_preset("flux2-klein"), "suffix")
    assert same(
        get_preset("ollama/z-image"),
        get_preset("z-image"),
        "padding_rows",
        "layers",
        "hidden_states",
        "negative_prompt",
    )
