"""Every key form that people's files have, down to one name."""

import re

import pytest

from encoder.checkpoint.tensors.keys import find_encoder
from encoder.errors import CheckpointError

NAMES = ["embed_tokens.weight", "layers.0.self_attn.q_norm.weight", "layers.3.mlp.up_proj.weight", "norm.weight"]


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
        pytest.param("_orig_mod.model.", id="torch-compile"),
        pytest.param("module._orig_mod.model.", id="data-parallel-of-compiled"),
        pytest.param("base_model.model.model.", id="peft"),
        pytest.param("text_encoder.model.language_model.", id="trainer"),
        pytest.param("thinker.model.", id="unheard-of"),
    ],
)
def test_prefix_is_what_stands_before_the_layers(prefix: str) -> None:
    """It says which class was saved and what wrapped it, nothing about the weights."""
    found = find_encoder([prefix + name for name in NAMES], "file")

    assert found.prefix == prefix
    assert found.names == {prefix + name: name for name in NAMES}
    assert found.warnings == []


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module._orig_mod."])
def test_wrapper_of_single_layers_is_left_out_of_their_names(wrapper: str) -> None:
    """FSDP, activation checkpointing and torch.compile wrap layers, and modules within them."""
    keys = [re.sub(r"(layers\.\d\.|self_attn\.)", rf"\1{wrapper}", f"model.{name}") for name in NAMES]
    found = find_encoder(keys, "file")

    assert list(found.names.values()) == NAMES
    assert found.warnings == []


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
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.k_cache.scale",
        "model.diffusion_model.layers.0.attention.qkv.weight",
        "vae.decoder.conv_in.weight",
        "scaled_fp8",
        "model.layers.0.mlp.up_proj.input_scale",
        "model.layers.0.mlp.up_proj.scale_input",
        "model.layers.0.self_attn.k_proj.k_scale",
        "model.layers.0.self_attn.v_scale",
        "text_encoders.qwen3_4b.logit_scale",
        "mtp.layers.0.self_attn.q_norm.weight",
    ],
)
def test_tensor_that_is_usual_beside_an_encoder_is_left_out(key: str) -> None:
    """Heads and vision towers may be gigabytes."""
    found = find_encoder([f"model.{name}" for name in NAMES] + [key], "file")

    assert key not in found.names
    assert found.warnings == []


@pytest.mark.parametrize(
    "part",
    [
        pytest.param("input_scale", id="ModelOpt"),
        pytest.param("output_scale", id="quanto"),
        pytest.param("k_scale", id="vLLM-keys"),
        pytest.param("v_scale", id="vLLM-values"),
        pytest.param("kv_scale", id="AutoFP8"),
        pytest.param("act_scale", id="AutoFP8-activations"),
        pytest.param("q_scale", id="vLLM-queries"),
        pytest.param("prob_scale", id="vLLM-probabilities"),
        pytest.param("prob_output_scale", id="Quark"),
        pytest.param("input_zero_point", id="compressed-tensors"),
        pytest.param("k_zero_point", id="compressed-tensors-keys"),
        pytest.param("input_global_scale", id="compressed-tensors-nvfp4"),
        pytest.param("input_scale_ub", id="FBGEMM"),
        pytest.param("input_amax", id="amax"),
        pytest.param("input_quantizer._amax", id="ModelOpt-state"),
        pytest.param("k_bmm_quantizer._amax", id="ModelOpt-state-keys"),
        pytest.param("activation_scaling_factor", id="TensorRT-LLM"),
        pytest.param("kv_cache_scaling_factor", id="TensorRT-LLM-cache"),
    ],
)
def test_scale_of_activations_is_left_out(part: str) -> None:
    """In a module of the encoder. It is not even worth a warning."""
    key = f"model.layers.0.self_attn.k_proj.{part}"
    found = find_encoder([f"model.{name}" for name in NAMES] + [key], "file")

    assert key not in found.names
    assert found.warnings == []


@pytest.mark.parametrize(
    "part",
    [
        "weight_scale",
        "weight_scale_2",
        "weight_scale_inv",
        "scale_weight",
        "weight_zero_point",
        "weight_global_scale",
        "scales",
        "scale",
        "zero_point",
        "weight_s_rel",
        "weight_s_channel",
        "pre_quant_scale",
        "input_quantizer._pre_quant_scale",
        "weights_scaling_factor",
        "prequant_scaling_factor",
        "weight_quantizer._amax",
    ],
)
def test_scale_of_a_weight_is_never_left_out(part: str) -> None:
    """Whoever cannot use it has to refuse it."""
    key = f"model.layers.0.self_attn.k_proj.{part}"
    assert key in find_encoder([*(f"model.{name}" for name in NAMES), key], "file").names


def test_tensors_that_nobody_expects_are_counted() -> None:
    """They are left out too, and the user hears of it."""
    more = ["score.weight", "v_head.summary.weight", "v_head.summary.bias", "model.extra.weight"]
    found = find_encoder([f"model.{name}" for name in NAMES] + more, "file")

    assert set(found.names.values()) == set(NAMES)
    [warning] = found.warnings
    assert "4 tensors (score.weight, v_head.summary.weight, v_head.summary.bias, and 1 more)" in warning


def test_unknown_tensor_inside_the_model_is_kept() -> None:
    """So that the comparison with the dims refuses it."""
    key = "model.layers.0.self_attn.q_proj.mystery"
    assert key in find_encoder([*(f"model.{name}" for name in NAMES), key], "file").names


def test_adapter_beside_a_whole_model_is_left_out_with_a_word() -> None:
    """It may be a leftover of merging, or the reason why the file exists."""
    key = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    found = find_encoder([f"model.{name}" for name in NAMES] + [key], "file")

    assert key not in found.names
    assert "--lora" in found.warnings[0]


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("", "lm_head."),
        ("base_model.model.model.", "base_model.model.lm_head."),
    ],
)
def test_tied_head_stands_for_the_embedding(prefix: str, head: str) -> None:
    """Of two names for one tensor, safetensors' writers keep one."""
    keys = [prefix + name for name in NAMES[1:]] + [f"{head}weight", f"{head}scales"]
    found = find_encoder(keys, "file")

    assert found.names[f"{head}weight"] == "embed_tokens.weight"
    assert found.names[f"{head}scales"] == "embed_tokens.scales"


def test_several_models_are_listed_and_one_is_chosen() -> None:
    """As in a file of a model that listens and speaks."""
    first, second = "thinker.model.", "talker.model."
    keys = [prefix + name for prefix in (first, second) for name in NAMES]

    with pytest.raises(CheckpointError, match=r"several Qwen3 .*--component is one of talker, thinker"):
        find_encoder(keys, "file")
    assert find_encoder(keys, "file", "talker").prefix == second
    assert find_encoder(keys, "file", first).prefix == first
    with pytest.raises(CheckpointError, match="--component think is one of talker, thinker"):
        find_encoder(keys, "file", "think")


def test_component_that_is_not_there_is_refused() -> None:
    """Even where there is one model alone: a misspelt word must not choose it."""
    with pytest.raises(CheckpointError, match="--component talker is one of model"):
        find_encoder([f"model.{name}" for name in NAMES], "file", "talker")


def test_encoder_of_ace_step_is_known_beside_its_language_model() -> None:
    """ComfyUI's names for the two say which is which. The choice is a warning."""
    small, large = "text_encoders.qwen3_06b.transformer.model.", "text_encoders.qwen3_4b.transformer.model."
    keys = [prefix + name for prefix in (large, small) for name in NAMES]
    found = find_encoder(keys, "file")

    assert found.prefix == small
    assert found.warnings == [f"of two Qwen3, {small} is taken for the encoder; --component takes {large}"]
    assert find_encoder(keys, "file", "qwen3_4b").prefix == large
    assert find_encoder(keys, "file", "qwen3_4b").warnings == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        pytest.param([], "begin with no tensor", id="empty"),
        pytest.param(["model.layers.0.self_attn.q_proj.weight"], "another language model", id="llama"),
        pytest.param(["model.layers.0.self_attn.q_proj.bias"], "Qwen2.5 or its VL", id="qwen2"),
        pytest.param(["encoder.block.0.layer.0.SelfAttention.q.weight"], "seems to be T5", id="t5"),
        pytest.param(["text_model.encoder.layers.0.self_attn.q_proj.weight"], "seems to be CLIP", id="clip"),
        pytest.param(["model.diffusion_model.layers.0.attention.qkv.weight"], "seems to be a denoiser", id="denoiser"),
        pytest.param(["decoder.conv_in.weight"], "seems to be a VAE", id="vae"),
        pytest.param(["a.weight"], "its 1 tensors begin with a.weight. Give a checkpoint", id="unknown"),
        pytest.param(["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "holds a LoRA", id="adapter"),
        pytest.param(["x" * 10_000], re.escape("x" * 80 + ". Give"), id="long-key"),
    ],
)
def test_no_model_is_explained_by_what_is_there(keys: list[str], message: str) -> None:
    """Without an echo of long names."""
    with pytest.raises(CheckpointError, match=message):
        find_encoder(keys, "file")
