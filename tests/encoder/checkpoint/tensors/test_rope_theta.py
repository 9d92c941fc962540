"""Qwen3 and Qwen3-VL have the same tensors and another rope_theta, which is known, assumed with a warning, or asked."""

from dataclasses import replace
from typing import Any

import pytest

from encoder.checkpoint.files.demo_files import CONFIG
from encoder.checkpoint.tensors.rope_theta import Evidence, find_rope_theta, settle_rope_theta
from encoder.errors import CheckpointError
from encoder.presets.built_in import PRESETS
from encoder.presets.preset import Preset
from encoder.qwen3.config import Qwen3Config

PLAIN_KEYS = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight", "model.norm.weight"]
SIZE_4B = {"hidden_size": 2560, "intermediate_size": 9728, "vocab_size": 151936}


def evidence(**fields: Any) -> Evidence:
    """Of a single file with Qwen3-4B's dims, which Qwen3-VL-4B has too."""
    return Evidence(**{"where": "a/model.safetensors", "keys": PLAIN_KEYS, **SIZE_4B, **fields})


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        pytest.param({"frequencies": 123456.0, "names": ["qwen3vl_4b.safetensors"]}, 123456.0, id="frequencies"),
        pytest.param({"keys": ["model.visual.merger.norm.weight"]}, 5e6, id="vision-tower"),
        pytest.param({"keys": ["vision_tower.deepstack_merger_list.0.norm.weight"]}, 5e6, id="deepstack"),
        pytest.param({"hidden_size": 1024, "intermediate_size": 3072}, 1e6, id="dims-of-0.6B"),
        pytest.param({"hidden_size": 5120, "intermediate_size": 17408}, 1e6, id="dims-of-14B"),
        pytest.param({"metadata": {"mflux_version": "0.12.0"}}, 1e6, id="mflux-before-krea-2"),
        pytest.param({"metadata": {"config": '{"text_config": {"rope_theta": 2e6}}'}}, 2e6, id="config-in-the-header"),
        pytest.param({"metadata": {"c": '{"rope_parameters": {"rope_theta": 2e6}}'}}, 2e6, id="newer-config"),
        pytest.param({"metadata": {"mflux_version": "0.9.6"}}, 1e6, id="mflux-of-one-digit"),
    ],
)
def test_facts_need_no_warning(fields: dict[str, Any], theta: float) -> None:
    found = find_rope_theta(evidence(**fields))

    assert found.value == theta
    assert found.warning is None
    assert not found.source.startswith("assumed")


@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("qwen_3_4b.safetensors", 1e6),
        ("qwen_3_8b_fp8mixed.safetensors", 1e6),
        ("qwen_3_4b_fp4_flux2.safetensors", 1e6),
        ("qwen_0.6b_ace15.safetensors", 1e6),
        ("qwen_1.7b_ace15.safetensors", 1e6),
        ("qwen_4b_ace15.safetensors", 1e6),
        ("qwen_3_06b_base.safetensors", 1e6),
        ("Qwen3-4B-Z-Image-Turbo-abliterated.safetensors", 1e6),
        ("z_image_turbo_text_encoder.safetensors", 1e6),
        ("flux.2-klein-9b-te.safetensors", 1e6),
        ("Qwen3-Embedding-0.6B.safetensors", 1e6),
        ("ovis_2.5.safetensors", 1e6),
        ("qwen3vl_4b_fp8_scaled.safetensors", 5e6),
        ("qwen3vl_8b_bf16.safetensors", 5e6),
        ("Qwen3-VL-4B.safetensors", 5e6),
        ("Qwen-3-4B-VL-IT.safetensors", 5e6),
        ("Qwen3VL-8B-Instruct_int8_convrot.safetensors", 5e6),
        ("qwen3vl_32b_minimax_h3-q4.gguf", 5e6),
        ("krea2_qwen_3_vl.safetensors", 5e6),
        ("qwen3vl_4b_flux2_klein.safetensors", 5e6),
        ("krea-2-turbo-te.safetensors", 5e6),
        ("ideogram4_text_encoder.safetensors", 5e6),
        ("fibo2_te.safetensors", 5e6),
        ("JoyImage-Edit.safetensors", 5e6),
        ("mage_flow.safetensors", 5e6),
        ("flux3_te.safetensors", 5e6),
        ("nucleusmoe.safetensors", 5e6),
        ("qwen-image-2.1_te.safetensors", 5e6),
        ("Qwen3-4B-Instruct-2507.safetensors", 5e6),
    ],
)
def test_name_is_an_assumption_with_a_warning(name: str, theta: float) -> None:
    """Files that many people have, with dims that would not decide."""
    found = find_rope_theta(evidence(names=[name, "text_encoders", "models"]))

    assert found.value == theta
    assert found.source.startswith("assumed: ")
    assert found.warning is not None
    assert f"{theta:.0f}" in found.warning


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        pytest.param({"names": ["0.safetensors", "text_encoder", "Krea-2-Turbo-mflux-4bit"]}, 5e6, id="folder"),
        pytest.param(
            {"names": ["x.safetensors", "Comfy-Org/z_image_turbo/text_encoders/x.safetensors"]}, 1e6, id="hub"
        ),
        pytest.param({"keys": ["text_encoders.qwen3vl_4b.transformer.model.norm.weight"]}, 5e6, id="component"),
        pytest.param({"keys": ["text_encoders.qwen3_4b.transformer.model.norm.weight"]}, 1e6, id="component-qwen3"),
        pytest.param({"keys": ["model.language_model.norm.weight"]}, 5e6, id="language-model"),
        pytest.param({"metadata": {"modelspec.architecture": "z-image-turbo"}}, 1e6, id="metadata"),
        pytest.param({"metadata": {"general.base_model": "Qwen/Qwen3-VL-4B-Instruct"}}, 5e6, id="metadata-vl"),
        pytest.param({"classes": ["ZImagePipeline"]}, 1e6, id="z-image-pipeline"),
        pytest.param({"classes": ["Flux2KleinPipeline"]}, 1e6, id="klein-pipeline"),
        pytest.param({"classes": ["Krea2Pipeline", "Krea2Transformer2DModel"]}, 5e6, id="krea-pipeline"),
        pytest.param({"classes": ["Ideogram4Pipeline"]}, 5e6, id="ideogram-pipeline"),
        pytest.param({"classes": ["QwenImage21Pipeline", "Qwen3VLForConditionalGeneration"]}, 5e6, id="qwen-image"),
        pytest.param({"classes": ["PRXPixelPipeline"]}, 5e6, id="prx-pipeline"),
        pytest.param({"classes": ["NucleusMoEImagePipeline"]}, 5e6, id="nucleus-pipeline"),
        pytest.param({"vocab_size": 217204}, 1e6, id="vocabulary-of-ace-step"),
        pytest.param({"siblings": ["vae", "unconditional_transformer"]}, 5e6, id="ideogram-siblings"),
        pytest.param({"siblings": ["preprocessor_config.json"]}, 5e6, id="image-processor"),
        pytest.param(
            {"metadata": {"mflux_version": "0.24.0"}, "siblings": ["transformer", "vae", "tokenizer"]},
            5e6,
            id="mflux-krea-2",
        ),
    ],
)
def test_other_signs_are_assumptions_too(fields: dict[str, Any], theta: float) -> None:
    found = find_rope_theta(evidence(**fields))

    assert (found.value, found.source[:9]) == (theta, "assumed: ")
    assert found.warning is not None


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"names": ["model.safetensors", "downloads"]}, id="model"),
        pytest.param({"names": ["text_encoder.safetensors", "text_encoders"]}, id="text-encoder"),
        pytest.param({"names": ["qwen_3.5_9b.safetensors"]}, id="another-qwen"),
        pytest.param({"names": ["animation.safetensors", "kreator", "revlon"]}, id="words-within-words"),
        pytest.param({"names": ["te.safetensors", "backup_202507", "2507"]}, id="a-date"),
        pytest.param({"vocab_size": 151669}, id="vocabulary-of-the-tokenizer"),
        pytest.param({"metadata": {"mflux_version": "0.24.0"}}, id="mflux-alone"),
        pytest.param(
            {"metadata": {"mflux_version": "0.24.0"}, "siblings": ["vae", "transformer/0.safetensors"]},
            id="mflux-with-a-transformer",
        ),
        pytest.param({"metadata": {"mflux_version": "latest", "format": "pt"}}, id="metadata-that-name-nothing"),
        pytest.param({"metadata": {"config": '["rope_theta"]', "c": '{"rope_theta"'}}, id="what-is-no-config"),
        pytest.param({"metadata": {"config": '{"text_config": 1, "rope_theta": 2}'}}, id="what-is-half-a-config"),
    ],
)
def test_where_nothing_says_it_the_user_is_asked(fields: dict[str, Any]) -> None:
    """One line with the setting, both values and which systems need which."""
    with pytest.raises(CheckpointError, match=r"^a/model.safetensors: .*Give --rope-theta 1000000 or") as raised:
        find_rope_theta(evidence(**fields))

    for words in ("Z-Image", "Krea 2", "5000000", "config.json"):
        assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"names": ["qwen_3_4b_krea2.safetensors"]}, id="model-and-system"),
        pytest.param({"names": ["z_image_to_ideogram.safetensors"]}, id="two-systems"),
        pytest.param({"names": ["qwen_3_4b.safetensors", "krea2"]}, id="file-and-folder"),
        pytest.param({"names": ["qwen3vl_4b.safetensors"], "classes": ["ZImagePipeline"]}, id="name-and-pipeline"),
        pytest.param(
            {"hidden_size": 1024, "intermediate_size": 3072, "keys": ["visual.merger.norm.weight"]}, id="two-facts"
        ),
    ],
)
def test_signs_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"rope_theta is 1000000.*Give --rope-theta"):
        find_rope_theta(evidence(**fields))


def test_scaled_rope_in_a_header_is_refused() -> None:
    """The theta alone would give another model."""
    config = '{"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 4}}'

    with pytest.raises(CheckpointError, match=r"^a/model.safetensors: 'config' in the header: RoPE is scaled"):
        find_rope_theta(evidence(metadata={"config": config}))


def test_what_the_user_gives_comes_first() -> None:
    """With a warning where a fact says otherwise, and none where only a name does."""
    against_a_fact = find_rope_theta(evidence(given=5e6, frequencies=1e6))
    against_a_name = find_rope_theta(evidence(given=5e6, names=["qwen_3_4b.safetensors"]))
    alone = find_rope_theta(evidence(given=7e6))

    assert (against_a_fact.value, against_a_name.value, alone.value) == (5e6, 5e6, 7e6)
    assert {found.source for found in (against_a_fact, against_a_name, alone)} == {"--rope-theta"}
    assert against_a_fact.warning is not None
    assert against_a_name.warning is alone.warning is None


def test_theta_of_a_config_is_known_unless_the_config_leaves_it_out() -> None:
    """transformers computes with the default then, and so do we."""
    config = Qwen3Config.from_dict(CONFIG)
    own, stated = settle_rope_theta(config, "a/config.json", True, None)
    _, default = settle_rope_theta(replace(config, rope_theta=1e4), "a/config.json", False, None)
    changed, overridden = settle_rope_theta(config, "a/config.json", True, 5e6)

    assert own == config
    assert (stated.source, stated.warnings) == ("a/config.json", ())
    assert (default.value, default.source) == (1e4, "the default")
    assert default.warning is not None
    assert changed == replace(config, rope_theta=5e6)
    assert overridden.warning is not None
    assert "should be 1000000: a/config.json says so" in overridden.warning


@pytest.mark.parametrize("preset", PRESETS[1:], ids=lambda preset: preset.name)
def test_name_of_every_system_that_has_a_preset_is_known(preset: Preset) -> None:
    """A preset for another system needs its word in families.py. The first preset belongs to none."""
    theta = 5e6 if "Qwen3-VL" in preset.description or "dreamlite" in preset.name else 1e6

    assert find_rope_theta(evidence(names=[f"{preset.name}.safetensors"])).value == theta


def test_long_names_are_cut() -> None:
    """They come from strangers."""
    metadata = {"modelspec.title": "krea 2 " + "x" * 10_000}

    warning = find_rope_theta(evidence(metadata=metadata, names=["y" * 10_000])).warning

    assert warning is not None
    assert len(warning) < 500
