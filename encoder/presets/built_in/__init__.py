"""What each diffusion system wants from the encoder: one Preset per system, its source beside it. Data only.

Each preset names the file and the function that it reproduces in `source`. The number behind a field is the line of
that file which says the field's value; a name behind it is a definition in that file, and "ours" marks what the
source leaves open. The lines are those of

    diffusers         0.42.1, under src/diffusers
    ollama            0e2e34aa8; the presets under ollama/ are those of its image generation, which differs from the
                      reference
    ComfyUI           d7593f48 for boogu.py, 0f548d22 for ideogram4.py; presets under comfyui/ differ from the reference
    DiffSynth-Studio  2.1.12
    HDM               de8e1c91
    Iris-3B           df42d8ff of geelen/iris-3b, a copy
    JoyAI-Image       043ea4e4
    LingBot-Video     f348dca4
    Mage              8c94a0ac
    SD.Next           058a7f0c
    T2I-L2P           a99d361f of vinx6903/T2I-L2P, a copy

closing_token="" says that the system's own tokenizer adds no token: Qwen3's and Qwen3-VL's. Those with
add_special_tokens=False need not say it. A field that is not given has the default of `Preset`. tests/parity/presets
compares each preset with its pipeline, or with a reference written from it where it does not run there.
"""

from encoder.presets.built_in.ace_step import ACE_STEP, ACE_STEP_LYRICS, DIFFSYNTH_MUSIC, DIFFSYNTH_MUSIC_LYRICS
from encoder.presets.built_in.bare_prompt import ANIMA, HDM, LAST_HIDDEN_STATE, MINIMAX_H3, PRX_PIXEL
from encoder.presets.built_in.chat_template import (
    BOOGU,
    COMFYUI_IDEOGRAM_4,
    FIBO_2,
    IDEOGRAM_4,
    LINGBOT_VIDEO,
    NUCLEUS_IMAGE,
    OVIS_IMAGE,
    QWEN_IMAGE_2_1,
    SEFI_IMAGE,
)
from encoder.presets.built_in.flux import FLUX2_KLEIN, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX3, OLLAMA_FLUX2_KLEIN
from encoder.presets.built_in.qwen_image import (
    DREAMLITE,
    DREAMLITE_NEGATIVE,
    DREAMLITE_PRENORM,
    DREAMLITE_PRENORM_NEGATIVE,
    IRIS_3B,
    JOYAI_VIDEO,
    JOYIMAGE_EDIT,
    JOYIMAGE_EDIT_PLUS,
    KREA_2,
    MAGE_FLOW,
)
from encoder.presets.built_in.z_image import OLLAMA_Z_IMAGE, Z_IMAGE, Z_IMAGE_L2P, Z_IMAGE_OMNI, ZETA_CHROMA
from encoder.presets.catalog import Catalog
from encoder.presets.preset import Preset

__all__ = ["BUILT_IN", "FLUX2_KLEIN", "LAST_HIDDEN_STATE", "PRESETS", "Z_IMAGE", "get_preset"]

PRESETS: tuple[Preset, ...] = (  # in the order in which GET /presets and docs/presets.md list them
    LAST_HIDDEN_STATE,
    FLUX2_KLEIN,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    OLLAMA_FLUX2_KLEIN,
    FLUX3,
    Z_IMAGE,
    Z_IMAGE_OMNI,
    Z_IMAGE_L2P,
    ZETA_CHROMA,
    OLLAMA_Z_IMAGE,
    KREA_2,
    IRIS_3B,
    DREAMLITE,
    DREAMLITE_NEGATIVE,
    DREAMLITE_PRENORM,
    DREAMLITE_PRENORM_NEGATIVE,
    MAGE_FLOW,
    JOYIMAGE_EDIT,
    JOYIMAGE_EDIT_PLUS,
    JOYAI_VIDEO,
    OVIS_IMAGE,
    IDEOGRAM_4,
    COMFYUI_IDEOGRAM_4,
    NUCLEUS_IMAGE,
    QWEN_IMAGE_2_1,
    FIBO_2,
    BOOGU,
    SEFI_IMAGE,
    LINGBOT_VIDEO,
    PRX_PIXEL,
    ANIMA,
    HDM,
    MINIMAX_H3,
    ACE_STEP,
    ACE_STEP_LYRICS,
    DIFFSYNTH_MUSIC,
    DIFFSYNTH_MUSIC_LYRICS,
)

BUILT_IN = Catalog(PRESETS, default=LAST_HIDDEN_STATE.name)


def get_preset(name: str) -> Preset:
    """The built-in preset of that name or alias.

    Errors: InvalidField naming all presets when there is none.
    """
    return BUILT_IN.get(name)
