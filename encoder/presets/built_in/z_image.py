"""Z-Image and what was made from it. How to read the numbers beside the fields: see the package's docstring."""

from dataclasses import replace

from encoder.presets.built_in.templates import ASSISTANT, USER
from encoder.presets.preset import Preset

Z_IMAGE = Preset(
    name="z-image",
    description="Z-Image Turbo and Base, image to image, inpainting and ControlNet (Qwen3-4B).",
    source="diffusers: pipelines/z_image/pipeline_z_image.py, _encode_prompt",
    aliases=("z-image-turbo",),
    prefix=USER,  # 221-226: the chat template with add_generation_prompt=True
    suffix=ASSISTANT,  # 225: enable_thinking=True, for which the template adds nothing
    closing_token="",
    max_sequence_length=512,  # 207, 232
    overlong="cut",  # 233
    padding="max_length",  # 231
    padding_rows="cut",  # 249: rows are selected by the mask
    layers=(-2,),  # 244: hidden_states[-2], which is the output of the last layer but one
    negative_prompt="",  # 188
)

Z_IMAGE_OMNI = replace(  # a segment is a prompt of its own: 241-251, segments do not attend to each other
    Z_IMAGE,
    name="z-image-omni",
    description="Z-Image-Omni and Edit with images: each segment, template included, is a prompt of its own.",
    source="diffusers: pipelines/z_image/pipeline_z_image_omni.py, _encode_prompt",
    aliases=(),
    prefix="",  # 228-236: the client writes the template, which depends on the number of images
    suffix="",
)

Z_IMAGE_L2P = replace(  # ai-toolkit: extensions_built_in/diffusion_models/z_image/z_image_l2p_model.py says the same
    Z_IMAGE,
    name="z-image-l2p",
    description="Z-Image L2P, in pixels (Qwen3-4B).",
    source="T2I-L2P: diffsynth/pipelines/z_image_L2P.py, encode_prompt",  # line by line that of Z-Image
    aliases=("l2p",),
)

ZETA_CHROMA = replace(  # ai-toolkit: extensions_built_in/diffusion_models/zeta_chroma/zeta_chroma_pipeline.py agrees
    Z_IMAGE,
    name="zeta-chroma",
    description="Zeta-Chroma, in pixels (Qwen3-4B of Z-Image).",
    source="SD.Next: pipelines/zetachroma/pipeline.py, _encode_single_prompt",  # 139-162, 170: that of Z-Image
    aliases=("zetachroma",),
)

OLLAMA_Z_IMAGE = replace(
    Z_IMAGE,
    name="ollama/z-image",
    description="Z-Image as Ollama encodes it: the last hidden state after the final norm, all 512 rows.",
    source="ollama: x/imagegen/models/qwen3/text_encoder.go, EncodePrompt",
    aliases=("ollama/z-image-turbo",),
    padding_rows="live",  # EncodePrompt returns a mask, which ../zimage/zimage.go throws away
    layers=None,
    hidden_states=(-1,),  # TextEncoder.Forward: all layers and the final norm
    negative_prompt=None,  # ../zimage/zimage.go: no guidance unless the caller gives a negative prompt
)
