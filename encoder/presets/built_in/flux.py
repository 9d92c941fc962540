"""FLUX.2 klein and FLUX.3. How to read the numbers beside the fields: see the package's docstring."""

from dataclasses import replace

from encoder.presets.built_in.templates import ASSISTANT, NO_THINKING, USER
from encoder.presets.preset import Preset

FLUX2_KLEIN = Preset(
    name="flux2-klein",
    description="FLUX.2 klein, base and distilled; any size of Qwen3.",
    source="diffusers: pipelines/flux2/pipeline_flux2_klein.py, _get_qwen3_prompt_embeds",
    prefix=USER,  # 226-232: the chat template with add_generation_prompt=True
    suffix=ASSISTANT + NO_THINKING,  # 231: enable_thinking=False
    closing_token="",
    max_sequence_length=512,  # 214, 238
    overlong="cut",  # 237
    padding="max_length",  # 236
    padding_rows="live",  # 263: all rows are returned; 855: the transformer gets them without a mask
    layers=(8, 17, 26),  # 215, 257: hidden_states 9, 18 and 27
    combine="concat",  # 261: (B, 3, L, D) -> (B, L, 3 * D), the whole of one layer after the other
    negative_prompt="",  # 750
)

FLUX2_KLEIN_4B = replace(
    FLUX2_KLEIN,
    name="flux2-klein-4b",
    description="FLUX.2 klein 4B (Qwen3-4B).",
    hidden_size=2560,  # config.json of Qwen/Qwen3-4B
)

FLUX2_KLEIN_9B = replace(
    FLUX2_KLEIN,
    name="flux2-klein-9b",
    description="FLUX.2 klein 9B (Qwen3-8B).",
    hidden_size=4096,  # config.json of Qwen/Qwen3-8B
)

OLLAMA_FLUX2_KLEIN = replace(  # all else is as in diffusers: the window, the padding and the layers
    FLUX2_KLEIN,
    name="ollama/flux2-klein",
    description="FLUX.2 klein as Ollama encodes it: without the empty <think> block.",
    source="ollama: x/imagegen/models/qwen3/text_encoder.go, EncodePromptWithLayers",
    suffix=ASSISTANT,  # ApplyChatTemplate adds the block for think=true; ../flux2/flux2.go passes false
)

FLUX3 = Preset(
    name="flux3",
    description="FLUX.3 (Qwen3-VL-4B). The pipeline's prompt upsampler is not part of it.",
    source="diffusers: modular_pipelines/flux3/encoders.py, _get_qwen3_vl_prompt_embeds",
    prefix=USER,  # 258-260: Qwen3-VL's chat template
    suffix=ASSISTANT,  # 259: add_generation_prompt=True; this template has no thinking
    closing_token="",
    max_sequence_length=8192,  # 251
    overlong="cut",  # 262, 271
    padding="own",  # 233: one prompt per call, padded to its own length
    pad_to_multiple_of=80,  # 252, 265
    padding_rows="live",  # 276: "FLUX.3 attends to the padding tokens"
    pad_position=1,  # 279: as in transformers 4.57, with which the model was trained
    layers=(3, 7, 11, 15, 19, 23, 27, 31),  # 253, 290: hidden_states 4, 8, ..., 32
    combine="concat",  # 294
    negative_prompt="",  # 324
)
