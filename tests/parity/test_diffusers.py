"""Our prompt embeds against those that diffusers' pipelines make themselves, and the pictures that come of them.

Tiny denoisers and VAEs with random weights, after diffusers' own tests, around Qwen3's real tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import Preset, TextEncoder, get_preset
from encoder.options import ModelOptions
from tests.reference import relative_error

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
diffusers = pytest.importorskip("diffusers", reason="needs diffusers: make test-parity")

pytestmark = pytest.mark.parity

# Both sides round in float32, over 28 layers and up to 512 positions: up to 4e-5 here. A wrong token is off by 1e-1.
CLOSE = 1e-4
# Pixels between 0 and 1, after two steps of a denoiser that the embeds above were fed to.
SAME_PICTURE = 1e-4

PROMPTS = [
    pytest.param([""], id="empty"),
    pytest.param(["a photo of a red fox sitting in deep snow"], id="plain"),
    pytest.param(["a lighthouse over a stormy sea, oil on canvas, " * 60], id="longer-than-the-window"),
    pytest.param(["a fox 🦊 and a family 👨‍👩‍👧"], id="emoji"),
    pytest.param(["一只红色的狐狸坐在深雪里。清晨的柔光"], id="chinese"),
    pytest.param(["e\u0301te\u0301 à la ﬁn"], id="decomposed-accents"),
    pytest.param(["\nstarts with a newline, ends with blanks  "], id="leading-newline"),
    pytest.param(["a sign that says <|im_end|>\n<|im_start|>user\n<think> <|endoftext|>"], id="special-tokens"),
    pytest.param(["a cat", "", "a much longer prompt about a dog that runs through tall grass"], id="batch"),
]


@pytest.fixture(scope="module")
def text_encoder(qwen3_folder: Path) -> TextEncoder:
    return TextEncoder.open(ModelOptions(str(qwen3_folder), compute_dtype="float32"))


@pytest.fixture(scope="module")
def flux2_klein(qwen3_folder: Path) -> Any:
    torch.manual_seed(0)
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLFlux2(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(4,),
            layers_per_block=1,
            latent_channels=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=transformers.Qwen3ForCausalLM.from_pretrained(qwen3_folder, dtype=torch.float32).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(qwen3_folder),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=256,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def z_image(qwen3_folder: Path) -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],  # room for 512 rows of text before the picture
    )
    with torch.no_grad():  # diffusers leaves these two as they come out of memory
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
            up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
            block_out_channels=[32, 64],
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=transformers.AutoModel.from_pretrained(qwen3_folder, dtype=torch.float32).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(qwen3_folder),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_embeds(text_encoder: TextEncoder, prompts: Sequence[str], preset: str | Preset) -> list[Any]:
    """Our embeds as the tensors that a pipeline takes."""
    preset = get_preset(preset) if isinstance(preset, str) else preset
    return [torch.tensor(embeds.hidden_states) for embeds in text_encoder.encode(prompts, preset, "float32")]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_flux2_klein_embeds_equal_the_pipelines(
    text_encoder: TextEncoder, flux2_klein: Any, prompts: list[str]
) -> None:
    """All 512 rows, since the denoiser attends to all of them."""
    with torch.no_grad():
        theirs, _ = flux2_klein.encode_prompt(prompts)
    ours = torch.stack(our_embeds(text_encoder, prompts, "flux2-klein"))

    assert theirs.shape == (len(prompts), 512, 48)
    assert relative_error(ours, theirs) < CLOSE


@pytest.mark.parametrize("prompts", PROMPTS)
def test_z_image_embeds_equal_the_pipelines(text_encoder: TextEncoder, z_image: Any, prompts: list[str]) -> None:
    """As many rows as there are tokens: the pipeline cuts the padding."""
    with torch.no_grad():
        theirs, _ = z_image.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    ours = our_embeds(text_encoder, prompts, "z-image")

    for our, their in zip(ours, theirs, strict=True):
        assert relative_error(our, their) < CLOSE


def test_last_hidden_state_equals_the_models(text_encoder: TextEncoder, z_image: Any) -> None:
    """Without a preset a request gets what `model(**tokenizer(prompt)).last_hidden_state` is."""
    prompt = "a photo of a red fox 🦊"
    with torch.no_grad():
        [theirs] = z_image.text_encoder(**z_image.tokenizer(prompt, return_tensors="pt")).last_hidden_state
    [ours] = our_embeds(text_encoder, [prompt], "last-hidden-state")

    assert relative_error(ours, theirs) < CLOSE


def test_flux2_klein_paints_the_same_picture_from_our_embeds(text_encoder: TextEncoder, flux2_klein: Any) -> None:
    """A pipeline without a text encoder is what the service is for."""
    prompt = "a red fox in deep snow"
    settings = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np"}
    whole = flux2_klein(prompt=prompt, generator=torch.manual_seed(0), **settings).images
    [positive, negative] = our_embeds(
        text_encoder, [prompt, get_preset("flux2-klein").negative_prompt or ""], "flux2-klein"
    )
    without = diffusers.Flux2KleinPipeline(**(flux2_klein.components | {"text_encoder": None, "tokenizer": None}))
    without.set_progress_bar_config(disable=True)
    ours = without(
        prompt_embeds=positive[None], negative_prompt_embeds=negative[None], generator=torch.manual_seed(0), **settings
    ).images
    other = flux2_klein(prompt="a blue boat", generator=torch.manual_seed(0), **settings).images

    np.testing.assert_allclose(ours, whole, atol=SAME_PICTURE)
    assert np.abs(other - whole).max() > 10 * SAME_PICTURE  # the prompt matters to this denoiser


def test_z_image_paints_the_same_picture_from_our_embeds(text_encoder: TextEncoder, z_image: Any) -> None:
    """A pipeline without a text encoder is what the service is for."""
    prompt = "a red fox in deep snow"
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    whole = z_image(prompt=prompt, generator=torch.manual_seed(0), **settings).images
    embeds = our_embeds(text_encoder, [prompt, get_preset("z-image").negative_prompt or ""], "z-image")
    without = diffusers.ZImagePipeline(**(z_image.components | {"text_encoder": None, "tokenizer": None}))
    without.set_progress_bar_config(disable=True)
    ours = without(
        prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], generator=torch.manual_seed(0), **settings
    ).images
    other = z_image(prompt="a blue boat", generator=torch.manual_seed(0), **settings).images

    np.testing.assert_allclose(ours, whole, atol=SAME_PICTURE)
    assert np.abs(other - whole).max() > 10 * SAME_PICTURE  # the prompt matters to this denoiser
