"""What each diffusion system wants from the encoder: one frozen Preset per system, its source beside it. Data only.

Prompt strings, layers, windows and padding are those of the reference pipelines; the entries under `ollama/` are those
of Ollama's image generation where it differs from the reference.
"""

from dataclasses import replace

from encoder.presets.catalog import Catalog
from encoder.presets.preset import Preset

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

# FLUX.2, FLUX.3

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

OLLAMA_FLUX2_KLEIN = replace(  # think=false leaves the <think> block out; everything else is as in the reference
    FLUX2_KLEIN,
    name="ollama/flux2-klein",
    description="FLUX.2 klein as Ollama encodes it: without the empty <think> block.",
    source="ollama: x/imagegen/models/qwen3/text_encoder.go, EncodePromptWithLayers",
    suffix=ASSISTANT,
)

FLUX3 = Preset(  # padding rows are seen by the transformer, and all stand at position 1, as in transformers 4.57
    name="flux3",
    description="FLUX.3 (Qwen3-VL-4B). The pipeline's prompt upsampler is not part of it.",
    source="diffusers: modular_pipelines/flux3/encoders.py, encode_prompt",
    prefix=USER,
    suffix=ASSISTANT,
    max_sequence_length=8192,
    padding="own",
    pad_to_multiple_of=80,
    padding_rows="live",
    pad_position=1,
    layers=(3, 7, 11, 15, 19, 23, 27, 31),
)

# Z-Image

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

Z_IMAGE_OMNI = replace(  # segments do not see each other: each is a prompt of its own
    Z_IMAGE,
    name="z-image-omni",
    description="Z-Image-Omni and Edit with images: each segment, template included, is a prompt of its own.",
    source="diffusers: pipelines/z_image/pipeline_z_image_omni.py, _encode_prompt",
    aliases=(),
    prefix="",
    suffix="",
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

# Qwen-Image's system turn, 34 tokens, and those who took it over

DESCRIBE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n" + USER
)

KREA_2 = Preset(  # padding stands in the middle, and positions do not count it: the rows are those of an unpadded run
    name="krea-2",
    description="Krea 2 Raw and Turbo (Qwen3-VL-4B): 12 hidden states stacked behind the rows.",
    source="diffusers: pipelines/krea2/pipeline_krea2.py, get_text_hidden_states",
    prefix=DESCRIBE,
    tail=ASSISTANT,
    max_sequence_length=546,
    padding="max_length",
    padding_rows="zero",
    hidden_states=(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35),
    combine="stack_rows",
    dropped_rows=34,
)

DREAMLITE = Preset(
    name="dreamlite",
    description="DreamLite and DreamLite-mobile, text to image (Qwen3-VL-2B), as with transformers 5.",
    source="diffusers: pipelines/dreamlite/pipeline_dreamlite.py, encode_prompt",
    prefix=DESCRIBE + "[Generate]: ",
    suffix=ASSISTANT,
    max_sequence_length=234,
    hidden_states=(-1,),
    dropped_rows=34,
    negative_preset="dreamlite-negative",
)

DREAMLITE_NEGATIVE = replace(
    DREAMLITE,
    name="dreamlite-negative",
    description="The negative prompt of DreamLite, which has no [Generate] mark.",
    prefix=DESCRIBE,
    negative_preset=None,
)

DREAMLITE_PRENORM = replace(  # before transformers 5, hidden_states[-1] of this class was un-normed
    DREAMLITE,
    name="dreamlite-prenorm",
    description="DreamLite as with transformers 4.57: the last layer without the final norm.",
    layers=(-1,),
    hidden_states=None,
    negative_preset="dreamlite-prenorm-negative",
)

DREAMLITE_PRENORM_NEGATIVE = replace(
    DREAMLITE_PRENORM,
    name="dreamlite-prenorm-negative",
    description="The negative prompt of DreamLite as with transformers 4.57.",
    prefix=DESCRIBE,
    negative_preset=None,
)

MAGE_FLOW = Preset(
    name="mage-flow",
    description="Mage-Flow, text to image (Qwen3-VL-4B).",
    source="ComfyUI: comfy/text_encoders/mage_flow.py",
    prefix=DESCRIBE,
    suffix=ASSISTANT,
    max_sequence_length=4096,
    overlong="refused",
    hidden_states=(-1,),
    dropped_rows=34,
)

JOYIMAGE_EDIT = Preset(  # backslash and n are two characters in the reference; 34 of 36 tokens of the turn are dropped
    name="joyimage-edit",
    description="JoyImage-Edit without an input image (Qwen3-VL-8B).",
    source="diffusers: pipelines/joyimage/pipeline_joyimage_edit.py, _get_qwen_prompt_embeds",
    prefix=DESCRIBE.replace("system\n", "system\n \\n"),
    suffix=ASSISTANT,
    max_sequence_length=2082,
    layers=(-1,),
    dropped_rows=34,
)

# Others with a template

OVIS_IMAGE = Preset(  # zeros count: the transformer has no mask
    name="ovis-image",
    description="Ovis-Image (Ovis2.5-2B).",
    source="diffusers: pipelines/ovis_image/pipeline_ovis_image.py, _get_ovis_prompt_embeds",
    prefix=USER
    + "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships "
    "of the objects and background: ",
    suffix=ASSISTANT + NO_THINKING,
    add_special_tokens=False,
    max_sequence_length=284,
    padding="max_length",
    padding_rows="zero",
    hidden_states=(-1,),
    dropped_rows=28,
)

IDEOGRAM_4 = Preset(  # the pipeline pads on the left, where any amount gives the same image; rows here are not padded
    name="ideogram-4",
    description="Ideogram 4 (Qwen3-VL-8B): 13 layers, interleaved. Trained on JSON captions.",
    source="diffusers: pipelines/ideogram4/pipeline_ideogram4.py, _get_text_encoder_hidden_states",
    prefix=USER,
    suffix=ASSISTANT,
    add_special_tokens=False,
    max_sequence_length=2048,
    overlong="refused",
    layers=(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35),
    combine="interleave",
    negative_prompt=None,
)

NUCLEUS_IMAGE = Preset(
    name="nucleus-image",
    description="NucleusMoE-Image (Qwen3-VL-8B).",
    source="diffusers: pipelines/nucleusmoe_image/pipeline_nucleusmoe_image.py, encode_prompt",
    prefix="<|im_start|>system\nYou are an image generation assistant. Follow the user's prompt literally. Pay careful "
    "attention to spatial layout: objects described as on the left must appear on the left, on the right on the right. "
    "Match exact object counts and assign colors to the correct objects.<|im_end|>\n" + USER,
    suffix=ASSISTANT,
    max_sequence_length=1024,
    pad_to_multiple_of=8,
    padding_rows="zero",
    hidden_states=(-8,),
)

QWEN_IMAGE_2_1 = Preset(  # trained with transformers 4.57, where the last hidden state was un-normed
    name="qwen-image-2.1",
    description="Qwen-Image-2.1, text to image (Qwen3-VL-8B).",
    source="diffusers: pipelines/qwenimage21/pipeline_qwenimage21.py, _get_qwen_prompt_embeds",
    prefix="<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n" + USER,
    suffix=ASSISTANT,
    empty_prompt=" ",
    max_sequence_length=4096,
    overlong="refused",
    layers=(-1,),
    dropped_rows=14,
)

FIBO_2 = Preset(  # six bundles of three hidden states, in the order of the transformer's inputs
    name="fibo-2",
    description="Bria Fibo 2.0 (Qwen3-VL-4B). The prompt is the pipeline's cleaned, compact JSON caption.",
    source="diffusers: pipelines/bria_fibo2/pipeline_bria_fibo2.py, encode_prompt",
    prefix=USER,
    suffix=ASSISTANT,
    max_sequence_length=4096,
    hidden_states=(9, 20, 31, 5, 16, 27, 7, 18, 29, 9, 20, 31, 11, 22, 33, 13, 24, 35),
    unit_rms=True,
    bundle=3,
    combine="stack",
    negative_prompt='{"short_description":"","objects":[],"background_setting":"","lighting":{},"aesthetics":{},'
    '"photographic_characteristics":{},"style_medium":"","context":"","artistic_style":""}',
)

BOOGU = Preset(  # no generation prompt; an empty prompt has another system turn
    name="boogu",
    description="Boogu-Image, text to image (Qwen3-VL-8B).",
    source="ComfyUI: comfy/text_encoders/boogu.py",
    prefix="<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user "
    "instructions. The instructions are as follows.<|im_end|>\n" + USER,
    empty_prefix="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, "
    "objects, background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n" + USER,
    suffix="<|im_end|>\n",
    max_sequence_length=4096,
    overlong="refused",
    hidden_states=(-1,),
)

# Bare prompts, and music

PRX_PIXEL = Preset(  # an empty prompt has no token, and its mask is all False
    name="prx-pixel",
    description="PRX Pixel (Qwen3-VL-Embedding-2B). The prompt is the pipeline's cleaned text.",
    source="diffusers: pipelines/prx/pipeline_prx_pixel.py, encode_prompt",
    max_sequence_length=256,
    padding="max_length",
    padding_rows="zero",
    hidden_states=(-1,),
)

ANIMA = Preset(  # an empty prompt is one zero row
    name="anima",
    description="Anima (Qwen3-0.6B base). The T5 ids of its adapter are the client's.",
    source="diffusers: modular_pipelines/anima/encoders.py, get_qwen_prompt_embeds",
    min_length=1,
    padding_rows="zero",
    hidden_states=(-1,),
)

MINIMAX_H3 = Preset(  # by layer: the last hidden state of a checkpoint cut to 50 layers, as ComfyUI's, is normed
    name="minimax-h3",
    description="MiniMax-H3, text only (Qwen3-VL-32B).",
    source="diffusers: modular_pipelines/minimax_h3/encoders.py",
    empty_prompt="<|endoftext|>",  # as in ComfyUI; the pipeline fails on a prompt without tokens
    add_special_tokens=False,
    max_sequence_length=4096,
    overlong="refused",
    layers=(49,),
    negative_prompt=None,
)

ACE_STEP = Preset(  # other metas: send prefix and suffix
    name="ace-step",
    description="ACE-Step 1.5, text to music (Qwen3-Embedding-0.6B), 60 seconds and no other metas.",
    source="diffusers: pipelines/ace_step/pipeline_ace_step.py, encode_prompt",
    prefix="# Instruction\nFill the audio semantic mask based on the given conditions:\n\n# Caption\n",
    suffix="\n\n# Metas\n- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n- duration: 60 seconds\n<|endoftext|>\n",
    max_sequence_length=256,
    hidden_states=(-1,),
    negative_prompt=None,
)

ACE_STEP_LYRICS = Preset(
    name="ace-step-lyrics",
    description="The lyrics of ACE-Step 1.5, English: rows of the embedding table.",
    source="diffusers: pipelines/ace_step/pipeline_ace_step.py, encode_prompt",
    prefix="# Languages\nen\n\n# Lyric\n",
    suffix="<|endoftext|>",
    max_sequence_length=2048,
    hidden_states=(0,),
    negative_prompt=None,
)

PRESETS: tuple[Preset, ...] = (
    LAST_HIDDEN_STATE,
    FLUX2_KLEIN,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    OLLAMA_FLUX2_KLEIN,
    FLUX3,
    Z_IMAGE,
    Z_IMAGE_OMNI,
    OLLAMA_Z_IMAGE,
    KREA_2,
    DREAMLITE,
    DREAMLITE_NEGATIVE,
    DREAMLITE_PRENORM,
    DREAMLITE_PRENORM_NEGATIVE,
    MAGE_FLOW,
    JOYIMAGE_EDIT,
    OVIS_IMAGE,
    IDEOGRAM_4,
    NUCLEUS_IMAGE,
    QWEN_IMAGE_2_1,
    FIBO_2,
    BOOGU,
    PRX_PIXEL,
    ANIMA,
    MINIMAX_H3,
    ACE_STEP,
    ACE_STEP_LYRICS,
)

BUILT_IN = Catalog(PRESETS, default=LAST_HIDDEN_STATE.name)


def get_preset(name: str) -> Preset:
    """The built-in preset of that name or alias.

    Errors: InvalidField naming all presets when there is none.
    """
    return BUILT_IN.get(name)
