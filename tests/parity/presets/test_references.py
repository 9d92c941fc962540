"""Presets of the systems whose code does not run here, against references written anew from their source.

Each reference is transformers' tokenizer and model, called as the named function calls them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from encoder import TextEncoder, get_preset
from encoder.errors import InvalidField
from tests.parity.presets.compare import OVERLONG, PROMPTS, assert_equal, encode, last_layer

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")

pytestmark = pytest.mark.parity

USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
EACH = [*(prompt for case in PROMPTS for prompt in case.values[0]), OVERLONG[0]]


def in_chat(tokenizer: Any, content: Any) -> str:
    """The user's turn and a generation prompt, by the tokenizer's own chat template."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def z_image_like(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Any]:
    """T2I-L2P, ZImageUnit_PromptEmbedder.encode_prompt, and SD.Next, ZetaChromaPipeline._encode_single_prompt."""
    texts = [USER.format(prompt) for prompt in prompts]
    inputs = tokenizer(texts, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    states = model(**inputs, output_hidden_states=True).hidden_states[-2]
    return [rows[mask.bool()] for rows, mask in zip(states, inputs.attention_mask, strict=True)]


@pytest.mark.parametrize("preset", ["z-image-l2p", "zeta-chroma"])
@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_z_images_kin_equal_their_reference(
    qwen3: TextEncoder, qwen3_model: Any, qwen3_tokenizer_of_transformers: Any, prompts: list[str], preset: str
) -> None:
    """Real rows of the last layer but one."""
    ours = qwen3.encode(prompts, get_preset(preset), "float32")
    theirs = z_image_like(qwen3_model, qwen3_tokenizer_of_transformers, prompts)

    for our, their in zip(ours, theirs, strict=True):
        assert_equal(our.hidden_states[None], their[None])


def sefi_image(model: Any, tokenizer: Any, prompts: Sequence[str], window: int) -> Any:
    """SD.Next, SeFiPipeline._get_qwen3vl_prompt_embeds."""
    texts = [in_chat(tokenizer, [{"type": "text", "text": prompt}]) for prompt in prompts]
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=window, return_tensors="pt")
    states = model(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([states[index] for index in (9, 18, 27)], dim=1).permute(0, 2, 1, 3).flatten(2)


@pytest.mark.parametrize("window", [1024, 100])
@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="long")])
def test_sefi_image_equals_its_reference(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompts: list[str], window: int
) -> None:
    """Every row, since the transformer sees the padding."""
    preset = get_preset("sefi-image")
    theirs = sefi_image(qwen3_vl_model, qwen3_vl_tokenizer, prompts, window)
    ours, _ = encode(qwen3_vl, prompts, replace(preset, max_sequence_length=window))

    assert preset.max_sequence_length == 1024
    assert_equal(ours, theirs)


def iris(model: Any, tokenizer: Any, prompts: Sequence[str], window: int) -> tuple[Any, Any]:
    """Iris-3B, Qwen3VLTextEncoder._run: embeddings (B, window, 12, D) and their mask."""
    start, end = DESCRIBE.split("{}")
    prefix, suffix = (tokenizer.encode(part, add_special_tokens=False) for part in (start, end))
    length = len(prefix) + window
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        caption = tokenizer(prompt, add_special_tokens=False).input_ids[: window - len(suffix)]
        real = torch.tensor(prefix + caption + suffix)
        ids[row, : len(real)], mask[row, : len(real)] = real, 1
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    stacked = torch.stack([states[index][:, len(prefix) :] for index in range(2, 36, 3)], dim=2)
    return stacked * mask[:, len(prefix) :, None, None], mask[:, len(prefix) :]


@pytest.mark.parametrize("window", [300, 20])
@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_iris_3b_equals_its_reference(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompts: list[str], window: int
) -> None:
    """Every row and the mask. A newline in front shares no token with the template, whose end is never cut."""
    preset = get_preset("iris-3b")
    theirs, their_mask = iris(qwen3_vl_model.model, qwen3_vl_tokenizer, prompts, window)
    ours, mask = encode(qwen3_vl, prompts, replace(preset, max_sequence_length=window + 34))

    assert preset.max_sequence_length == 300 + 34
    np.testing.assert_array_equal(mask, their_mask.bool())
    assert_equal(ours, theirs, mask)


DESCRIBE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize("window", [2048, 20])
@pytest.mark.parametrize("prompt", EACH)
def test_mage_flow_equals_its_reference(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompt: str, window: int
) -> None:
    """Mage, _encode_texts_packed: the rows behind the system turn and the user mark, after the final norm."""
    preset = get_preset("mage-flow")
    inputs = qwen3_vl_tokenizer(DESCRIBE.format(prompt), max_length=window + 34, truncation=True, return_tensors="pt")
    theirs = qwen3_vl_model.model(**inputs).last_hidden_state[:, 34:]
    ours, _ = encode(qwen3_vl, [prompt], replace(preset, max_sequence_length=window + 34))

    assert preset.max_sequence_length == 2048 + 34
    assert_equal(ours, theirs)


JOYAI_VIDEO = (
    "<|im_start|>system\n \\nDescribe the video by detailing the following aspects:\n"
    "1. The main content and theme of the video.\n"
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.\n"
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.\n"
    "4. background environment, light, style and atmosphere.\n"
    "5. camera angles, movements, and transitions used in the video:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize("window", [2048, 30])
@pytest.mark.parametrize("prompt", EACH)
def test_joyai_video_equals_its_reference(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompt: str, window: int
) -> None:
    """JoyAI-Image, _get_qwen_prompt_embeds with transformers 4.57, which it asks for: the last layer un-normed."""
    preset = get_preset("joyai-video")
    inputs = qwen3_vl_tokenizer(
        JOYAI_VIDEO.format(prompt), max_length=window + 91, truncation=True, return_tensors="pt"
    )
    ours, _ = encode(qwen3_vl, [prompt], replace(preset, max_sequence_length=window + 91))
    theirs = last_layer(qwen3_vl_model.model.language_model, lambda: qwen3_vl_model.model(**inputs).last_hidden_state)

    assert preset.max_sequence_length == 2048 + 91
    assert_equal(ours, theirs[:, 91:])


@pytest.mark.parametrize("prompts", PROMPTS)
def test_ideogram_4_equals_comfyui_with_a_whole_qwen3_vl(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompts: list[str]
) -> None:
    """Ideogram4Qwen3VLTEModel.encode_token_weights: 13 states side by side for each feature, the last one normed."""
    for prompt in prompts:
        states = qwen3_vl_model.model(
            **qwen3_vl_tokenizer(USER.format(prompt), return_tensors="pt"), output_hidden_states=True
        ).hidden_states
        theirs = torch.stack([states[index] for index in (*range(1, 35, 3), 36)], dim=1).permute(0, 2, 3, 1).flatten(2)
        ours, _ = encode(qwen3_vl, [prompt], "comfyui/ideogram-4")

        assert_equal(ours, theirs)


def test_ideogram_4_of_comfyui_differs_in_the_last_layer_only() -> None:
    """Whatever else changes in the reference changes here."""
    ours, reference = get_preset("comfyui/ideogram-4"), get_preset("ideogram-4")
    kept = ("name", "description", "source", "layers", "hidden_states")

    assert replace(ours, **{field: getattr(reference, field) for field in kept}) == reference
    assert [tap.depth for tap in ours.taps(36)] == [tap.depth for tap in reference.taps(36)]


@pytest.mark.parametrize("prompts", [["a fox 🦊\n"], ["a cat", "a much longer prompt about a dog", " "]])
def test_hdm_equals_its_reference(
    qwen3: TextEncoder, qwen3_model: Any, qwen3_tokenizer_of_transformers: Any, prompts: list[str]
) -> None:
    """HDMXUTPipeline.__call__: every row, since the transformer sees the padding."""
    inputs = qwen3_tokenizer_of_transformers(prompts, padding="longest", return_tensors="pt")
    ours, _ = encode(qwen3, prompts, "hdm")

    assert_equal(ours, qwen3_model(**inputs).last_hidden_state)


LINGBOT_VIDEO = (
    "<|im_start|>system\nGiven a user input that may include a text prompt alone, a text prompt with an image "
    'reference, or a text prompt with a video reference or a video reference alone, generate an "Enhanced prompt" that '
    "provides detailed visual descriptions suitable for video generation. Evaluate the level of detail in the user's "
    "input: if it is simple, enrich it by adding specifics about colors, shapes, sizes, textures, lighting, motion "
    "dynamics, camera movement, temporal progression, and spatial relationships to create vivid, concrete, and "
    "temporally coherent scenes to create vivid and concrete scenes. Please generate only the enhanced description for "
    "the prompt below and avoid including any additional commentary or evaluations:<|im_end|>\n<|im_start|>user\n{}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize("prompt", EACH)
def test_lingbot_video_equals_its_reference(
    qwen3_vl: TextEncoder, qwen3_vl_model: Any, qwen3_vl_tokenizer: Any, prompt: str
) -> None:
    """LingBotVideoPipeline.encode_prompt: the rows behind the template's tokens up to the prompt, after the norm."""
    start = len(qwen3_vl_tokenizer(LINGBOT_VIDEO.partition("{}")[0]).input_ids)
    inputs = qwen3_vl_tokenizer([LINGBOT_VIDEO.format(prompt)], padding="longest", return_tensors="pt")
    theirs = qwen3_vl_model.model(**inputs).last_hidden_state[:, start:]
    ours, mask = encode(qwen3_vl, [prompt], "lingbot-video")

    assert mask.all()
    assert_equal(ours, theirs)


def test_lingbot_video_refuses_what_the_service_cannot_take_whole(qwen3_vl: TextEncoder) -> None:
    """Its pipeline's window is 37,698 tokens; cutting at fewer would change pictures without a word."""
    with pytest.raises(InvalidField, match="lingbot-video refuses"):
        qwen3_vl.tokenize([" fox" * 8192], get_preset("lingbot-video"))


@pytest.mark.parametrize("name", ["z-image-l2p", "zeta-chroma"])
def test_z_images_kin_differ_from_it_in_name_only(name: str) -> None:
    """Whatever changes in the reference changes in its kin."""
    reference = get_preset("z-image")
    kept = {field: getattr(reference, field) for field in ("name", "description", "source", "aliases")}

    assert replace(get_preset(name), **kept) == reference
