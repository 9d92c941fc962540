"""Presets of the systems that read a plain Qwen3, against the pipelines' own encoding."""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from encoder import TextEncoder, get_preset
from encoder.options import ModelOptions
from tests.parity.presets.compare import OVERLONG, PROMPTS, assert_equal, assert_real_rows_equal, encode

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
pytest.importorskip("diffusers", minversion="0.42.1", reason="needs diffusers 0.42.1: make test-parity")

pytestmark = pytest.mark.parity

LYRICS = ["", "[verse]\nla la 雪 🦊\n", "\n\n[chorus]\nsnow <|im_end|> falls  "]
NO_T5 = SimpleNamespace(input_ids=torch.zeros(1, 1), attention_mask=torch.ones(1, 1))


@pytest.fixture(scope="module")
def ovis_image(build: Callable[..., Any], qwen3_model: Any, qwen3_tokenizer_of_transformers: Any) -> Any:
    return build("OvisImagePipeline", text_encoder=qwen3_model, tokenizer=qwen3_tokenizer_of_transformers)


@pytest.fixture(scope="module")
def z_image_omni(build: Callable[..., Any], qwen3_model: Any, qwen3_tokenizer_of_transformers: Any) -> Any:
    return build("ZImageOmniPipeline", text_encoder=qwen3_model, tokenizer=qwen3_tokenizer_of_transformers)


@pytest.fixture(scope="module")
def embedding_folder(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a tokenizer that ends every text with <|endoftext|>, as Qwen3-Embedding's does."""
    folder = tmp_path_factory.mktemp("qwen3-embedding") / "checkpoint"
    shutil.copytree(qwen3_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing",
        "single": [text, end],
        "pair": [text, end, pair, end],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [151643], "tokens": ["<|endoftext|>"]}},
    }
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [tokenizer["post_processor"], template]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def embedding(embedding_folder: Path) -> TextEncoder:
    return TextEncoder.open(ModelOptions(str(embedding_folder), compute_dtype="float32"))


@pytest.fixture(scope="module")
def ace_step(build: Callable[..., Any], qwen3_model: Any, embedding_folder: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedding_folder)
    return build("AceStepPipeline", text_encoder=qwen3_model, tokenizer=tokenizer)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_ovis_image_equals_the_pipelines(qwen3: TextEncoder, ovis_image: Any, prompts: list[str]) -> None:
    """Every row, zeros included: its transformer has no mask."""
    theirs, _, _, _ = ovis_image.encode_prompt(prompts, do_classifier_free_guidance=False)
    ours, mask = encode(qwen3, prompts, "ovis-image")

    assert ours.shape[1] == 256
    assert_equal(ours, theirs, mask)


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_z_image_omni_equals_the_pipelines_segment_for_segment(
    qwen3: TextEncoder, z_image_omni: Any, prompts: list[str], images: int
) -> None:
    """The client writes the segments around its images; each is a prompt of its own, with a window of its own."""
    window = 64  # 512 would be more padding, which is cut
    preset = get_preset("z-image-omni")
    theirs, _ = z_image_omni.encode_prompt(
        list(prompts), num_condition_images=images, do_classifier_free_guidance=False, max_sequence_length=window
    )

    assert preset.max_sequence_length == default_of(z_image_omni.encode_prompt, "max_sequence_length")
    for prompt, their in zip(prompts, theirs, strict=True):
        ours = qwen3.encode(segments(prompt, images), replace(preset, max_sequence_length=window), "float32")
        assert len(ours) == len(their)
        for our, segment in zip(ours, their, strict=True):
            assert_equal(our.hidden_states[None], segment[None])


def default_of(function: Callable[..., Any], parameter: str) -> Any:
    return inspect.signature(function).parameters[parameter].default


def segments(prompt: str, images: int) -> list[str]:
    """As docs/presets.md says."""
    if images == 0:
        return [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"]
    return [
        "<|im_start|>user\n<|vision_start|>",
        *["<|vision_end|><|vision_start|>"] * (images - 1),
        f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_anima_equals_the_pipelines(
    qwen3: TextEncoder, qwen3_model: Any, qwen3_tokenizer_of_transformers: Any, prompts: list[str]
) -> None:
    """Every row, and the mask: an empty prompt alone is one zero row."""
    encoders = pytest.importorskip("diffusers.modular_pipelines.anima.encoders")
    components = SimpleNamespace(
        text_encoder=qwen3_model, tokenizer=qwen3_tokenizer_of_transformers, t5_tokenizer=lambda *_, **__: NO_T5
    )
    theirs = encoders.AnimaTextEncoderStep.encode_prompt(components, prompts, device=torch.device("cpu"))
    ours, mask = encode(qwen3, prompts, "anima")

    np.testing.assert_array_equal(mask, theirs["qwen_attention_mask"].bool())
    assert_equal(ours, theirs["qwen_prompt_embeds"], mask)


@pytest.mark.parametrize("prompts", [*PROMPTS, pytest.param(OVERLONG, id="longer-than-the-window")])
def test_ace_step_equals_the_pipelines(embedding: TextEncoder, ace_step: Any, prompts: list[str]) -> None:
    """Real rows and the mask; the pipeline also delivers what the model makes of padding, which it masks."""
    theirs, their_mask, _, _ = ace_step.encode_prompt(prompts, [""] * len(prompts), torch.device("cpu"))
    ours, mask = encode(embedding, prompts, "ace-step")

    np.testing.assert_array_equal(mask, their_mask)
    assert_real_rows_equal(ours, mask, theirs, their_mask)


def test_ace_step_takes_other_metas_as_a_suffix(embedding: TextEncoder, ace_step: Any) -> None:
    """The template's metas and instruction are the client's to fill in."""
    theirs, their_mask, _, _ = ace_step.encode_prompt(
        "calm piano",
        "",
        torch.device("cpu"),
        "en",
        30.5,
        "Repaint the mask area based on the given conditions",
        90,
        "C",
        "4",
    )
    prefix = "# Instruction\nRepaint the mask area based on the given conditions:\n\n# Caption\n"
    suffix = "\n\n# Metas\n- bpm: 90\n- timesignature: 4\n- keyscale: C\n- duration: 30 seconds\n<|endoftext|>\n"
    ours, mask = encode(embedding, ["calm piano"], replace(get_preset("ace-step"), prefix=prefix, suffix=suffix))

    np.testing.assert_array_equal(mask, their_mask)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("window", [2048, 24])
def test_ace_step_lyrics_equal_the_pipelines(embedding: TextEncoder, ace_step: Any, window: int) -> None:
    """Rows of the embedding table, cut at the window."""
    lyrics = [*LYRICS, "snow is falling on the town, " * 300]
    _, _, theirs, their_mask = ace_step.encode_prompt(
        [""] * len(lyrics), lyrics, torch.device("cpu"), max_lyric_length=window
    )
    preset = get_preset("ace-step-lyrics")
    ours, mask = encode(embedding, lyrics, replace(preset, max_sequence_length=window))

    assert preset.max_sequence_length == 2048
    np.testing.assert_array_equal(mask, their_mask)
    assert_real_rows_equal(ours, mask, theirs, their_mask)


DIFFSYNTH_MUSIC = """
# Instruction
Fill the audio semantic mask based on the given conditions:

# Caption
{}

# Metas
- bpm: 100
- timesignature: 4
- keyscale: B minor
- duration: 160 seconds
<|endoftext|>
"""


@pytest.mark.parametrize("prompt", [*(prompt for case in PROMPTS for prompt in case.values[0]), OVERLONG[0]])
def test_diffsynth_music_equals_its_reference(
    embedding: TextEncoder, qwen3_model: Any, ace_step: Any, prompt: str
) -> None:
    """DiffSynth-Studio, DiffSynthMusic_PromptEmbedder.process: its text is stripped, unlike ACE-Step's."""
    text = DIFFSYNTH_MUSIC.format(prompt).strip()
    inputs = ace_step.tokenizer(text, max_length=256, truncation=True, return_tensors="pt")
    ours, _ = encode(embedding, [prompt], "diffsynth-music")

    assert_equal(ours, qwen3_model(**inputs).last_hidden_state)


@pytest.mark.parametrize("lyrics", [*LYRICS, "snow is falling on the town, " * 300])
def test_diffsynth_musics_lyrics_equal_their_reference(
    embedding: TextEncoder, qwen3_model: Any, ace_step: Any, lyrics: str
) -> None:
    """The same function: rows of the embedding table."""
    text = f"# Languages\nN/A\n\n# Lyric\n{lyrics}<|endoftext|>"
    inputs = ace_step.tokenizer(text, max_length=2048, truncation=True, return_tensors="pt")
    ours, _ = encode(embedding, [lyrics], "diffsynth-music-lyrics")

    assert_equal(ours, qwen3_model.embed_tokens(inputs.input_ids))
