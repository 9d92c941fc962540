"""What each diffusion system wants from the encoder: one frozen Preset per system, its source beside it. Data only.

Prompt strings, layers, windows and padding are those of the reference pipelines; the entries under `ollama/` are those
of Ollama's image generation where it differs from the reference.
"""

from dataclasses import replace

from encoder.errors import InvalidField
from encoder.preset import Preset

USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
NO_THINKING = "<think>\n\n</think>\n\n"  # what the chat template adds for enable_thinking=False

LAST_HIDDEN_STATE = Preset(  # transformers, Qwen3Model(...).last_hidden_state on the bare prompt
    name="last-hidden-state",
    description="The bare prompt, last hidden state after the final norm: what a request without a preset gets.",
    source="transformers: models/qwen3/modeling_qwen3.py, Qwen3Model.forward",
    hidden_states=(-1,),
    negative_prompt=None,
)

FLUX2_KLEIN = Preset(  # the transformer attends to all 512 rows without a mask: padding rows are part of the contract
    name="flux2-klein",
    description="FLUX.2 klein, base and distilled; any size of Qwen3.",
    source="diffusers: pipelines/flux2/pipeline_flux2_klein.py, _get_qwen3_prompt_embeds",
    prefix=USER,
    suffix=ASSISTANT + NO_THINKING,
    padding="max_length",
    padding_rows="live",
    layers=(8, 17, 26),
)

FLUX2_KLEIN_4B = replace(
    FLUX2_KLEIN, name="flux2-klein-4b", description="FLUX.2 klein 4B (Qwen3-4B).", hidden_size=2560
)

FLUX2_KLEIN_9B = replace(
    FLUX2_KLEIN, name="flux2-klein-9b", description="FLUX.2 klein 9B (Qwen3-8B).", hidden_size=4096
)

Z_IMAGE = Preset(  # enable_thinking=True adds nothing to the template
    name="z-image",
    description="Z-Image Turbo and Base, image to image, inpainting and ControlNet (Qwen3-4B).",
    source="diffusers: pipelines/z_image/pipeline_z_image.py, _encode_prompt",
    aliases=("z-image-turbo",),
    prefix=USER,
    suffix=ASSISTANT,
    padding="max_length",
    padding_rows="cut",
    layers=(-2,),
)

OLLAMA_FLUX2_KLEIN = replace(  # think=false leaves the <think> block out; everything else is as in the reference
    FLUX2_KLEIN,
    name="ollama/flux2-klein",
    description="FLUX.2 klein as Ollama encodes it: without the empty <think> block.",
    source="ollama: x/imagegen/models/qwen3/text_encoder.go, EncodePromptWithLayers",
    suffix=ASSISTANT,
)

OLLAMA_Z_IMAGE = replace(  # the validity mask is thrown away, and all layers and the final norm are run
    Z_IMAGE,
    name="ollama/z-image",
    description="Z-Image as Ollama encodes it: the last hidden state after the final norm, all 512 rows.",
    source="ollama: x/imagegen/models/qwen3/text_encoder.go, EncodePrompt",
    aliases=("ollama/z-image-turbo",),
    padding_rows="live",
    layers=None,
    hidden_states=(-1,),
    negative_prompt=None,
)

PRESETS: tuple[Preset, ...] = (
    LAST_HIDDEN_STATE,
    FLUX2_KLEIN,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    Z_IMAGE,
    OLLAMA_FLUX2_KLEIN,
    OLLAMA_Z_IMAGE,
)

_BY_NAME = {name: preset for preset in PRESETS for name in (preset.name, *preset.aliases)}


def get_preset(name: str) -> Preset:
    """The preset of that name or alias.

    Errors: InvalidField naming all presets when there is none.
    """
    if name not in _BY_NAME:
        raise InvalidField("preset", f"{name!r} does not exist; allowed are {', '.join(p.name for p in PRESETS)}.")
    return _BY_NAME[name]
