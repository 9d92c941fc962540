"""Tiny components of diffusers' pipelines, with random weights, around the text encoder of one checkpoint.

The text half of each pipeline, the `text_encoder`, `tokenizer` or `processor`, comes from one `Text` that all share.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from tests.parity.conftest import TOKENIZER_FILES
from tests.parity.random_weights import randomize

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
diffusers = pytest.importorskip("diffusers", minversion="0.42", reason="needs diffusers: make test-parity")

D = 16  # hidden size of the text encoder
Components = dict[str, Any]

# What Qwen3-VL's chat template does to text, whose content may be a list of parts; Qwen3's own takes strings alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Processor:
    """As much of Qwen3VLProcessor as text needs; the real one asks for torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: Any, images: None = None, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return [self.tokenizer(text).input_ids] if tokenize else text


def write_checkpoint(folder: Path, tokenizer_folder: Path) -> None:
    """A Qwen3-VL that is deep enough for all of them but MiniMax-H3: 36 layers."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    language = {
        "hidden_size": D,
        "intermediate_size": 24,
        "num_hidden_layers": 36,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": D,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(text_config=language, vision_config=vision, tie_word_embeddings=True)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, folder)


class Text:
    """The text half of a pipeline, in each of the classes that pipelines ask for."""

    def __init__(self, folder: Path) -> None:
        self.qwen3_vl = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.embedding_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        close_texts(self.embedding_tokenizer)
        self.vl_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.vl_tokenizer.chat_template = CHAT_TEMPLATE
        self.processor = Processor(self.vl_tokenizer)

    def qwen3(self, name: str) -> Any:
        """The language model as a Qwen3 class: the same weights, under the same names."""
        text_config = self.qwen3_vl.config.text_config.to_dict()
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        dims = {name: text_config[name] for name in (*names, "head_dim", "vocab_size", "rms_norm_eps")}
        rope = {"rope_type": "default", "rope_theta": text_config["rope_parameters"]["rope_theta"]}
        model = getattr(transformers, name)(
            transformers.Qwen3Config(**dims, rope_parameters=rope, tie_word_embeddings=True)
        ).eval()
        bare = model if name == "Qwen3Model" else model.model
        bare.load_state_dict(self.qwen3_vl.model.language_model.state_dict())
        return model


def close_texts(tokenizer: Any) -> None:
    """Let it end every text with <|endoftext|>, as Qwen3-Embedding's does."""
    end = "<|endoftext|>"
    closing = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))]
    )
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([backend.post_processor, closing])


def random_components(build: Callable[[Text], Components], text: Text) -> Components:
    """The components, with weights in what the prompt goes through that let it matter."""
    torch.manual_seed(0)
    components = build(text)
    for name in ("transformer", "unconditional_transformer", "unet", "condition_encoder", "text_conditioner"):
        if name in components:
            randomize(components[name])
            components[name].eval()
    return components


def vae_flux2(channels: int = 4, latents: int = 1, **options: Any) -> Any:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(channels,),
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **options,
    )


def vae_kl(channels: tuple[int, ...], latents: int, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latents,
        **options,
    )


def vae_qwen_image() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def scheduler(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def flux2_klein(text: Text) -> Components:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * D,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ),
        "vae": vae_flux2(),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3("Qwen3ForCausalLM"),
        "tokenizer": text.tokenizer,
    }


def z_image_transformer(**options: Any) -> Any:
    return diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=D,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
        **options,
    )


def z_image(text: Text) -> Components:
    return {
        "transformer": z_image_transformer(),
        "vae": vae_kl((32, 64), 16, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3("Qwen3Model"),
        "tokenizer": text.tokenizer,
    }


def z_image_omni(text: Text) -> Components:
    return z_image(text) | {
        "transformer": z_image_transformer(siglip_feat_dim=D),
        "siglip": None,
        "siglip_processor": None,
    }


def ovis_image(text: Text) -> Components:
    return {
        "transformer": diffusers.OvisImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=D,
            axes_dims_rope=(4, 4, 8),
        ),
        "vae": vae_kl(
            (4,),
            1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5035,
        ),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3("Qwen3Model"),
        "tokenizer": text.tokenizer,
    }


def prx_pixel(text: Text) -> Components:
    return {
        "transformer": diffusers.PRXTransformer2DModel(
            patch_size=1,
            in_channels=3,
            context_in_dim=D,
            hidden_size=8,
            num_heads=2,
            depth=1,
            axes_dim=[2, 2],
            bottleneck_size=8,
            resolution_embeds=True,
        ),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl.model.language_model,
        "tokenizer": text.tokenizer,
    }


def krea_2(text: Text) -> Components:
    return {
        "transformer": diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=D,
            num_text_layers=12,
            text_num_attention_heads=2,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 2, 2),
        ),
        "vae": vae_qwen_image(),
        "scheduler": scheduler(use_dynamic_shifting=True),
        "text_encoder": text.qwen3_vl.model,
        "tokenizer": text.tokenizer,
    }


def nucleus_image(text: Text) -> Components:
    return {
        "transformer": diffusers.NucleusMoEImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=D,
            axes_dims_rope=(8, 4, 4),
            moe_enabled=False,
            capacity_factors=[8.0, 8.0],
        ),
        "vae": vae_qwen_image(),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl,
        "processor": text.processor,
    }


def joyimage_edit(text: Text) -> Components:
    return {
        "transformer": diffusers.JoyImageEditTransformer3DModel(
            patch_size=[1, 2, 2],
            in_channels=16,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=D,
            num_layers=1,
            rope_dim_list=[4, 6, 6],
            theta=256,
        ),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl,
        "tokenizer": text.tokenizer,
        "processor": text.processor,
    }


def qwen_image_2_1(text: Text) -> Components:
    return {
        "transformer": diffusers.QwenImage21Transformer2DModel(
            patch_size=1,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=D,
            mlp_ratio=2,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[False, True, True, True],
            latents_mean=[0.0] * 8,
            latents_std=[1.0] * 8,
        ),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl,
        "processor": text.processor,
    }


def fibo_2(text: Text) -> Components:
    return {
        "transformer": diffusers.BriaFibo2Transformer2DModel(
            in_channels=1,
            dim=32,
            n_layers=6,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=3 * D,
            injection_layer_ids=(1, 2, 3, 4, 5),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=(4, 6, 6),
            axes_lens=(128, 16, 16),
        ),
        "vae": vae_flux2(),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl,
        "processor": text.processor,
    }


def ideogram_4(text: Text) -> Components:
    def transformer() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * D,
            mrope_section=(2, 1, 1),
        )

    return {
        "transformer": transformer(),
        "unconditional_transformer": transformer(),
        "vae": vae_flux2(8, 4, patch_size=(2, 2)),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl.model,
        "tokenizer": text.vl_tokenizer,
    }


def ace_step(text: Text) -> Components:
    dims = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    return {
        "transformer": diffusers.AceStepTransformer1DModel(
            **dims, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2
        ),
        "condition_encoder": diffusers.AceStepConditionEncoder(
            **dims,
            text_hidden_dim=D,
            timbre_hidden_dim=8,
            num_lyric_encoder_hidden_layers=2,
            num_timbre_encoder_hidden_layers=2,
        ),
        "vae": diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=8,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        "scheduler": scheduler(num_train_timesteps=1, shift=1.0),
        "text_encoder": text.qwen3("Qwen3Model"),
        "tokenizer": text.embedding_tokenizer,
    }


def dreamlite(text: Text) -> Components:
    return {
        "unet": diffusers.DreamLiteUNetModel(
            sample_size=8,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(32, 64),
            cross_attention_dim=D,
            attention_head_dim=8,
            layers_per_block=1,
            norm_num_groups=8,
        ),
        "vae": diffusers.AutoencoderTiny(
            encoder_block_out_channels=(32, 32),
            decoder_block_out_channels=(32, 32),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3_vl,
        "tokenizer": text.tokenizer,
        "processor": text.processor,
    }


def flux3(text: Text) -> Components:
    return {
        "transformer": diffusers.Flux3Transformer2DModel(
            in_channels=4,
            cond_in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * D,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        "vae": vae_flux2(),
        "scheduler": scheduler(shift=3.0),
        "text_encoder": text.qwen3_vl,
        "tokenizer": text.processor,
    }


def anima(text: Text) -> Components:
    return {
        "transformer": diffusers.CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            text_embed_dim=D,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            concat_padding_mask=False,  # it takes torchvision
            extra_pos_embed_type=None,
        ),
        "text_conditioner": diffusers.AnimaTextConditioner(
            source_dim=D,
            target_dim=D,
            model_dim=D,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=151936,
            min_sequence_length=8,
        ),
        "vae": vae_qwen_image(),
        "scheduler": scheduler(),
        "text_encoder": text.qwen3("Qwen3Model"),
        "tokenizer": text.tokenizer,
        "t5_tokenizer": text.tokenizer,  # any tokenizer shows whether its ids arrive
    }
