"""Every key form that people's files have, down to one name."""

import pytest

from encoder.checkpoint.tensors.keys import parameter_name

NAME = "layers.3.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("model.", id="Qwen3ForCausalLM"),
        pytest.param("", id="Qwen3Model"),
        pytest.param("model.language_model.", id="Qwen3VLForConditionalGeneration"),
        pytest.param("language_model.", id="Qwen3VLModel"),
        pytest.param("language_model.model.", id="mlx-lm"),
        pytest.param("model.language_model.model.", id="nested"),
        pytest.param("text_encoder/model.", id="ollama"),
        pytest.param("text_encoder/", id="ollama-bare"),
        pytest.param("text_encoders.qwen3_4b.transformer.model.", id="comfyui-all-in-one"),
        pytest.param("qwen3_8b.transformer.model.", id="comfyui-saved-clip"),
    ],
)
def test_prefix_is_stripped(prefix: str) -> None:
    """The prefix says which class was saved, nothing about the weights."""
    assert parameter_name(prefix + NAME) == NAME


@pytest.mark.parametrize(
    "key",
    [
        "lm_head.weight",
        "model.lm_head.weight",
        "language_model.lm_head.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.visual.merger.norm.weight",
        "vision_tower.blocks.0.norm1.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
        "model.diffusion_model.layers.0.attention.qkv.weight",
        "vae.decoder.conv_in.weight",
        "scaled_fp8",
        "model.layers.0.mlp.up_proj.input_scale",
        "model.layers.0.mlp.up_proj.scale_input",
        "text_encoders.qwen3_4b.logit_scale",
    ],
)
def test_tensor_that_the_encoder_never_needs_has_no_name(key: str) -> None:
    """Heads and vision towers may be gigabytes."""
    assert parameter_name(key) is None
