"""How each family of pipelines takes embeds: a table. Its names are those of diffusers 0.42."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from app.embeds import Embeds
from app.pipelines import calls, forms, texts
from app.pipelines.forms import Arguments, ToTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How one family of pipelines takes embeds. Arguments for negatives have `negative_` in front of their names.

    Attributes:
        preset: that encodes for it.
        embeds, mask: names of the arguments; None is a pipeline without a mask.
        mask_dtype: of the mask.
        dtype: of the embeds; None is the transformer's.
        form: what the embeds are handed over as.
        beside: further arguments.
        guided: whether a call uses negatives.
        default_negative: whether guidance without a negative prompt uses the preset's; else it is off.
        prepare: what the pipeline does to its prompts.
        prepares_negatives: whether it does so to negatives too.
        window: in tokens; None is the preset's.
        kept: arguments that only the making of embeds needs, and that are not handed on.
        sees: arguments that the encoder of the pipeline looks at, so that the service cannot encode such a call.
        constant: arguments that are always given.
    """

    preset: str
    embeds: str = "prompt_embeds"
    mask: str | None = None
    mask_dtype: Literal["bool", "int64"] = "bool"
    dtype: Literal["float32"] | None = None
    form: Callable[[Embeds, int, ToTensor], Any] = forms.batch
    beside: Callable[[Any, list[str], Embeds, Arguments], Arguments] = forms.nothing
    guided: Callable[[Any, Arguments], bool] = calls.scale_over_1
    default_negative: bool = True
    prepare: Callable[[Any, list[str], Arguments], list[str]] = texts.unchanged
    prepares_negatives: bool = True
    window: Callable[[Any, Mapping[str, Any], Arguments], int | None] = calls.rows_kept
    kept: tuple[str, ...] = ()
    sees: tuple[str, ...] = ()
    constant: Mapping[str, Any] = field(default_factory=lambda: {"prompt": None})


def modular(adapter: Adapter) -> Adapter:
    """The same for a modular pipeline, whose block `text_encoder` has been taken out."""
    kept = (*adapter.kept, "max_sequence_length")  # an argument of that block
    return replace(adapter, guided=calls.guider, default_negative=True, kept=kept, constant={})


FLUX2_KLEIN = Adapter(preset="flux2-klein", guided=calls.scale_over_1_unless_distilled)
FLUX3 = modular(Adapter(preset="flux3"))
Z_IMAGE = Adapter(preset="z-image", form=forms.rows, guided=calls.scale_over_0)
Z_IMAGE_OMNI = replace(Z_IMAGE, preset="z-image-omni", form=forms.segments, prepare=texts.cut_at_images)
OVIS_IMAGE = Adapter(
    preset="ovis-image",
    constant={"prompt": None, "negative_prompt": None},  # whose default is "", which may not stand beside embeds
)
KREA_2 = Adapter(preset="krea-2", mask="prompt_embeds_mask", guided=calls.scale_over_0)
PRX_PIXEL = Adapter(
    preset="prx-pixel",
    mask="prompt_attention_mask",
    prepare=texts.clean_web_text,
    window=calls.prompt_max_tokens,
)
NUCLEUS_IMAGE = Adapter(preset="nucleus-image", mask="prompt_embeds_mask", mask_dtype="int64")
JOYIMAGE_EDIT = Adapter(
    preset="joyimage-edit",
    mask="prompt_embeds_mask",
    mask_dtype="int64",
    window=calls.preset_window,  # the pipeline itself cuts embeds that are longer than the call allows
    sees=("image",),
)
QWEN_IMAGE_2_1 = Adapter(
    preset="qwen-image-2.1",
    mask="prompt_embeds_mask",
    mask_dtype="int64",
    guided=calls.true_cfg_scale_over_1,
    default_negative=False,
    sees=("image",),
)
QWEN_IMAGE_2_1_MODULAR = modular(replace(QWEN_IMAGE_2_1, beside=forms.no_image_pads))
FIBO_2 = Adapter(
    preset="fibo-2",
    mask="prompt_embeds_mask",
    prepare=texts.clean_captions,
    prepares_negatives=False,  # the default one is a caption whose values are all empty
    sees=("image", "text_images"),
)
IDEOGRAM_4 = modular(
    Adapter(
        preset="ideogram-4",
        embeds="text_features",
        dtype="float32",
        form=forms.left_padded,
        beside=forms.text_lengths,
    )
)
ANIMA = modular(
    Adapter(
        preset="anima",
        embeds="qwen_prompt_embeds",
        mask="qwen_attention_mask",
        mask_dtype="int64",
        beside=forms.t5_ids,
        kept=("t5_tokenizer",),
    )
)
MINIMAX_H3 = modular(Adapter(preset="minimax-h3", beside=forms.text_tags, sees=("keyframes", "normalized_references")))

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
    "QwenImage21ModularPipeline": QWEN_IMAGE_2_1_MODULAR,
    "BriaFibo2Pipeline": FIBO_2,
    "Ideogram4ModularPipeline": IDEOGRAM_4,
    "AnimaModularPipeline": ANIMA,
    "MiniMaxH3ModularPipeline": MINIMAX_H3,
}


def adapter_for(pipe: Any) -> Adapter:
    """The adapter of a pipeline's class, or of the nearest class that it derives from.

    Errors: TypeError naming the classes that there are.
    """
    for base in type(pipe).__mro__:
        if base.__name__ in ADAPTERS:
            return ADAPTERS[base.__name__]
    raise TypeError(f"{type(pipe).__name__} does not take embeds, as far as is known; these do: {', '.join(ADAPTERS)}.")
