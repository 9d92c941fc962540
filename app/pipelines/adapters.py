"""How each family of pipelines takes embeds: a table. Its names are those of diffusers 0.42."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How one family of pipelines takes embeds. Arguments for negatives have `negative_` in front of their name.

    Attributes:
        preset: that encodes for it.
        embeds, mask: names of the arguments; without a mask's name none is given.
        mask_dtype: of the mask.
        dtype: of the embeds, where it is not the denoiser's.
        form: what the embeds are handed over as.
        guided: whether a call uses negatives.
        default_negative: whether guidance without a negative prompt uses the preset's, or is off.
        prepare: what the pipeline does to prompts, before the template.
        beside: further arguments.
        window: in tokens; None is the preset's.
        sees_images: whether the encoder reads the images of a call, which the service cannot do.
        constant: arguments that are always given.
    """

    preset: str
    embeds: str = "prompt_embeds"
    mask: str | None = None
    mask_dtype: Literal["bool", "int64"] = "bool"
    dtype: Literal["float32"] | None = None
    form: Callable[[Embeds, int, ToTensor], Any] = batch
    guided: Callable[[Any, Arguments], bool] = scale_over(1)
    default_negative: bool = True
    prepare: Callable[[Any, list[str], Arguments], list[str]] = unchanged
    beside: Callable[[Any, list[str], Embeds, Arguments], Arguments] = nothing
    window: Callable[[Any, Mapping[str, Any], Arguments], int | None] = preset_window
    sees_images: bool = False
    constant: Mapping[str, Any] = field(default_factory=lambda: {"prompt": None})


def modular(adapter: Adapter) -> Adapter:
    """The same for a modular pipeline, whose `text_encoder` block has been taken out."""
    return replace(adapter, guided=guider, default_negative=True, constant={})


FLUX2_KLEIN = Adapter(preset="flux2-klein", guided=scale_over_one_unless_distilled)
FLUX3 = modular(Adapter(preset="flux3"))
Z_IMAGE = Adapter(preset="z-image", form=rows, guided=scale_over(0))
Z_IMAGE_OMNI = replace(Z_IMAGE, preset="z-image-omni", form=segments, prepare=split_at_images)
OVIS_IMAGE = Adapter(  # the default of negative_prompt is "", which would stand beside the negative embeds
    preset="ovis-image", constant={"prompt": None, "negative_prompt": None}
)
KREA_2 = Adapter(preset="krea-2", mask="prompt_embeds_mask", guided=scale_over(0))
PRX_PIXEL = Adapter(preset="prx-pixel", mask="prompt_attention_mask", prepare=clean_web_text, window=prompt_max_tokens)
NUCLEUS_IMAGE = Adapter(preset="nucleus-image", mask="prompt_embeds_mask", mask_dtype="int64")
JOYIMAGE_EDIT = Adapter(
    preset="joyimage-edit", mask="prompt_embeds_mask", mask_dtype="int64", window=own_window, sees_images=True
)
QWEN_IMAGE_2_1 = Adapter(
    preset="qwen-image-2.1",
    mask="prompt_embeds_mask",
    mask_dtype="int64",
    guided=scale_over(1, "true_cfg_scale"),
    default_negative=False,
    sees_images=True,
)
FIBO_2 = Adapter(preset="fibo-2", mask="prompt_embeds_mask", prepare=clean_caption, sees_images=True)
IDEOGRAM_4 = modular(
    Adapter(preset="ideogram-4", embeds="text_features", dtype="float32", form=left_padded, beside=text_lengths)
)
ANIMA = modular(
    Adapter(preset="anima", embeds="qwen_prompt_embeds", mask="qwen_attention_mask", mask_dtype="int64", beside=t5_ids)
)
MINIMAX_H3 = modular(Adapter(preset="minimax-h3", beside=text_tags, sees_images=True))

ADAPTERS: dict[str, Adapter] = {
    "Flux2KleinPipeline": FLUX2_KLEIN,
    "Flux2KleinInpaintPipeline": FLUX2_KLEIN,
    "Flux2KleinKVPipeline": FLUX2_KLEIN,
    "Flux2KleinModularPipeline": modular(FLUX2_KLEIN),
    "Flux2KleinBaseModularPipeline": modular(FLUX2_KLEIN),
    "Flux3ModularPipeline": FLUX3,
    "ZImagePipeline": Z_IMAGE,
    "ZImageImg2ImgPipeline": Z_IMAGE,
    "ZImageInpaintPipeline": Z_IMAGE,
    "ZImageControlNetPipeline": Z_IMAGE,
    "ZImageControlNetInpaintPipeline": Z_IMAGE,
    "ZImageModularPipeline": modular(Z_IMAGE),
    "ZImageOmniPipeline": Z_IMAGE_OMNI,
    "OvisImagePipeline": OVIS_IMAGE,
    "Krea2Pipeline": KREA_2,
    "Krea2ModularPipeline": modular(KREA_2),
    "PRXPixelPipeline": PRX_PIXEL,
    "NucleusMoEImagePipeline": NUCLEUS_IMAGE,
    "JoyImageEditPipeline": JOYIMAGE_EDIT,
    "QwenImage21Pipeline": QWEN_IMAGE_2_1,
    "QwenImage21ModularPipeline": modular(QWEN_IMAGE_2_1),
    "BriaFibo2Pipeline": FIBO_2,
    "Ideogram4ModularPipeline": IDEOGRAM_4,
    "AnimaModularPipeline": ANIMA,
    "MiniMaxH3ModularPipeline": MINIMAX_H3,
}


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of a pipeline's class, or of the class that it derives from.

    Errors: TypeError naming the classes that there are.
    """
    for base in type(pipe).__mro__:
        if base.__name__ in ADAPTERS:
            return ADAPTERS[base.__name__]
    raise TypeError(f"{type(pipe).__name__} has no adapter; there are {', '.join(ADAPTERS)}.")
