"""Systems that write a chat template of their own, or use Qwen3's as it is.

How to read the numbers beside the fields: see the package's docstring.
"""

from dataclasses import replace

from encoder.presets.built_in.templates import ASSISTANT, END, NO_THINKING, USER
from encoder.presets.preset import Preset

OVIS_IMAGE = Preset(
    name="ovis-image",
    description="Ovis-Image (Ovis2.5-2B).",
    source="diffusers: pipelines/ovis_image/pipeline_ovis_image.py, _get_ovis_prompt_embeds",
    prefix=USER  # 189-196: the chat template; 177: what stands before the prompt in the user's turn
    + "Describe the image by detailing the color, quantity, text, shape, size, texture, spatial relationships "
    "of the objects and background: ",
    suffix=ASSISTANT + NO_THINKING,  # 195: enable_thinking=False
    add_special_tokens=False,  # 220
    max_sequence_length=284,  # 204, 218: 256 + 28
    overlong="cut",  # 217
    padding="max_length",  # 216
    padding_rows="zero",  # 229: multiplied by the mask; the transformer has no mask, so it attends to the zeros
    hidden_states=(-1,),  # 228: last_hidden_state
    dropped_rows=28,  # 178, 230
    negative_prompt="",  # 462
)

IDEOGRAM_4 = Preset(
    name="ideogram-4",
    description="Ideogram 4 (Qwen3-VL-8B): 13 layers, interleaved. Trained on JSON captions.",
    source="diffusers: pipelines/ideogram4/pipeline_ideogram4.py, encode_prompt",
    prefix=USER,  # 359-360: Qwen3-VL's chat template
    suffix=ASSISTANT,  # 360: add_generation_prompt=True
    add_special_tokens=False,  # 361
    max_sequence_length=2048,  # 495
    overlong="refused",  # 363
    padding="longest",  # ours: 366 pads on the left to the window, and any amount gives the same picture
    padding_rows="cut",  # 387: zeros in the pipeline, and masked in the transformer
    layers=(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35),  # 51, 330: the outputs of these decoder layers
    combine="interleave",  # 386: (13, B, L, D) -> (B, L, D * 13), the layers side by side for each feature
    negative_prompt=None,  # 345: the unconditional branch gets zeros
)

COMFYUI_IDEOGRAM_4 = replace(  # all else is as in diffusers, except that ComfyUI has no window
    IDEOGRAM_4,
    name="comfyui/ideogram-4",
    description="Ideogram 4 as ComfyUI encodes it with a whole Qwen3-VL-8B: the last layer is normed.",
    source="ComfyUI: comfy/text_encoders/ideogram4.py, Ideogram4Qwen3VLTEModel.encode_token_weights",
    layers=None,
    hidden_states=(1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 36),  # IDEOGRAM4_TAP_LAYERS; llama.py, Llama2_.forward,
    # applies the final norm before it takes state 36. The text-only checkpoint has no norm there, as in diffusers.
)

NUCLEUS_IMAGE = Preset(
    name="nucleus-image",
    description="NucleusMoE-Image (Qwen3-VL-8B).",
    source="diffusers: pipelines/nucleusmoe_image/pipeline_nucleusmoe_image.py, encode_prompt",
    prefix="<|im_start|>system\nYou are an image generation assistant. Follow the user's prompt literally. Pay careful "
    "attention to spatial layout: objects described as on the left must appear on the left, on the right on the right. "
    "Match exact object counts and assign colors to the correct objects." + END + USER,  # 41, 181-185
    suffix=ASSISTANT,  # 185: add_generation_prompt=True
    closing_token="",
    max_sequence_length=1024,  # 175, 225
    overlong="cut",  # 226
    padding="longest",  # 223
    pad_to_multiple_of=8,  # 224
    padding_rows="zero",  # ours: the pipeline returns computed rows with a mask (231), and the transformer hides them
    hidden_states=(-8,),  # 176, 234
    negative_prompt="",  # 500
)

QWEN_IMAGE_2_1 = Preset(
    name="qwen-image-2.1",
    description="Qwen-Image-2.1, text to image (Qwen3-VL-8B).",
    source="diffusers: pipelines/qwenimage21/pipeline_qwenimage21.py, _get_qwen_prompt_embeds",
    prefix="<|im_start|>system\nComprehend and analyze the provided prompt." + END + USER,  # 212, 217-221
    suffix=ASSISTANT,  # 219-220
    closing_token="",
    empty_prompt=" ",  # 249
    max_sequence_length=4096,  # ours: the pipeline has no limit
    overlong="refused",
    padding="longest",  # 284; the side, 285, changes no real row
    padding_rows="cut",  # 318: rows are selected by the mask
    layers=(-1,),  # 303-316: a hook takes the last layer's output, before the final norm
    dropped_rows=14,  # 229-231, 319: the system turn
)

SEFI_IMAGE = Preset(  # stable-diffusion.cpp's conditioner.hpp agrees: template, layers, 1024 rows
    name="sefi-image",
    description="SeFi-Image 1B, 2B and 5B (Qwen3-VL-2B, 4B for 5B).",
    source="SD.Next: pipelines/sefi/pipeline_sefi.py, _get_qwen3vl_prompt_embeds",
    aliases=("sefi",),
    prefix=USER,  # 308-314: Qwen3-VL's chat template
    suffix=ASSISTANT,  # 313: add_generation_prompt=True; this template has no thinking, which 314 turns off
    closing_token="",
    max_sequence_length=1024,  # 125, 353
    overlong="cut",  # 352
    padding="max_length",  # 351
    padding_rows="live",  # 379: all rows are returned; 640: the transformer gets them without a mask
    # Padding rows go on counting positions, as with transformers 5; transformers 4.57 put them all at position 1.
    hidden_states=(9, 18, 27),  # 124, 375
    combine="concat",  # 378: (B, 3, L, D) -> (B, L, 3 * D)
    negative_prompt="",  # 580
)

LINGBOT_VIDEO = Preset(  # SGLang, vllm-omni, DiffSynth-Studio and stable-diffusion.cpp agree
    name="lingbot-video",
    description="LingBot-Video, text to video (Qwen3-VL-4B). Trained on JSON captions.",
    source="LingBot-Video: lingbot_video/pipeline_lingbot_video.py, encode_prompt",
    aliases=("lingbot",),
    prefix="<|im_start|>system\nGiven a user input that may include a text prompt alone, a text prompt with an image "
    'reference, or a text prompt with a video reference or a video reference alone, generate an "Enhanced prompt" '
    "that provides detailed visual descriptions suitable for video generation. Evaluate the level of detail in the "
    "user's input: if it is simple, enrich it by adding specifics about colors, shapes, sizes, textures, lighting, "
    "motion dynamics, camera movement, temporal progression, and spatial relationships to create vivid, concrete, and "
    "temporally coherent scenes to create vivid and concrete scenes. Please generate only the enhanced description for "
    "the prompt below and avoid including any additional commentary or evaluations:" + END + USER,  # 27-37
    suffix=ASSISTANT,  # 37-38
    closing_token="",
    max_sequence_length=8192,  # ours: the service's limit; 24, 225: the pipeline's is 37698
    overlong="refused",  # ours: 224 cuts, beyond that limit
    padding="longest",  # 226
    padding_rows="cut",  # 269-272; several prompts: the transformer cuts them by the mask, transformer_..., 1150
    hidden_states=(-1,),  # 25, 105: last_hidden_state
    dropped_rows=140,  # 177-192, 265: the system turn and the user mark
    negative_prompt='{"universal_negative": {"visual_quality": ["low quality", "worst quality", "blurry", "pixelated", '
    '"jpeg artifacts", "low resolution", "unstable color", "color flicker", "underexposed", "overexposed", "invisible '
    'subject", "subject hidden in darkness"], "artistic_style": ["painting", "illustration", "drawing", "cartoon", "3d '
    'render", "cgi", "sketch", "digital art"], "composition_and_content": ["text", "watermark", "signature", "logo", '
    '"subtitles", "pillarboxed", "side bars", "portrait image in landscape frame"], "temporal_and_motion_stability": '
    '["flickering", "jittery", "motion blur", "temporal inconsistency", "warping", "morphing", "incoherent motion", '
    '"unnatural movement", "static object with sudden jump", "frame-to-frame inconsistency"], '
    '"material_and_structure": ["plastic-like glass", "unrealistic texture", "deformed bottle", "liquid freezing '
    'improperly", "distorted reflections"]}}',  # 43-45
)

FIBO_2 = Preset(
    name="fibo-2",
    description="Bria Fibo 2.0 (Qwen3-VL-4B). The prompt is the pipeline's cleaned, compact JSON caption.",
    source="diffusers: pipelines/bria_fibo2/pipeline_bria_fibo2.py, _get_qwen_prompt_embeds",
    prefix=USER,  # 58
    suffix=ASSISTANT,  # 58
    closing_token="",
    max_sequence_length=4096,  # 309
    overlong="cut",  # 337
    padding="longest",  # 335
    padding_rows="cut",  # 349: the mask hides them from the transformer
    hidden_states=(9, 20, 31, 5, 16, 27, 7, 18, 29, 9, 20, 31, 11, 22, 33, 13, 24, 35),  # 61
    unit_rms=True,  # 347
    bundle=3,  # 61, 348
    combine="stack",  # 349: dim=1 -> (B, 6, L, 3 * D)
    negative_prompt='{"short_description":"","objects":[],"background_setting":"","lighting":{},"aesthetics":{},'
    '"photographic_characteristics":{},"style_medium":"","context":"","artistic_style":""}',  # 48-52
)

BOOGU = Preset(  # SD.Next's copy of Boogu's own pipeline, pipelines/boogu/pipeline_boogu.py, agrees, as does vllm-omni
    name="boogu",
    description="Boogu-Image, text to image (Qwen3-VL-8B).",
    source="ComfyUI: comfy/text_encoders/boogu.py",
    prefix="<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user "
    "instructions. The instructions are as follows." + END + USER,  # BOOGU_T2I_SYSTEM
    empty_prefix="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, "
    "objects, background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate." + END + USER,  # BOOGU_DROP_SYSTEM, for a blank prompt
    suffix=END,  # BooguTokenizer.llama_template: no generation prompt
    closing_token="",
    max_sequence_length=4096,  # ours: ComfyUI has no limit
    overlong="refused",
    padding="longest",  # ours, to join prompts of one request: ComfyUI does not pad
    padding_rows="cut",
    hidden_states=(-1,),  # BooguQwen3VLClipModel: layer_norm_hidden_state = True
)
