"""Systems that tokenize the prompt as it is, without a template.

How to read the numbers beside the fields: see the package's docstring.
"""

from encoder.presets.preset import Preset

LAST_HIDDEN_STATE = Preset(
    name="last-hidden-state",
    description="The bare prompt, last hidden state after the final norm: what a request without a preset gets.",
    source="transformers: models/qwen3/modeling_qwen3.py, Qwen3Model.forward",
    hidden_states=(-1,),  # last_hidden_state of model(**tokenizer(prompt))
    negative_prompt=None,
)

PRX_PIXEL = Preset(
    name="prx-pixel",
    description="PRX Pixel (Qwen3-VL-Embedding-2B). The prompt is the pipeline's cleaned text.",
    source="diffusers: pipelines/prx/pipeline_prx_pixel.py, _encode_prompt_standard",
    closing_token=None,  # the checkpoint's own: that of Qwen3-VL-Embedding could not be looked at
    max_sequence_length=256,  # 41, 212
    overlong="cut",  # 213
    padding="max_length",  # 211
    padding_rows="zero",  # ours: the pipeline returns computed rows with a mask (256), and the transformer hides them.
    # An empty prompt has no token, so its mask is all False.
    hidden_states=(-1,),  # 249: last_hidden_state
    negative_prompt="",  # 411
)

ANIMA = Preset(
    name="anima",
    description="Anima (Qwen3-0.6B base). The T5 ids of its adapter are the client's.",
    source="diffusers: modular_pipelines/anima/encoders.py, _get_qwen_prompt_embeds",
    closing_token="",
    max_sequence_length=512,  # 176
    overlong="cut",  # 132
    padding="longest",  # 130
    min_length=1,  # 137-139: an empty prompt is one row, which the mask makes zero
    padding_rows="zero",  # 147: multiplied by the mask
    hidden_states=(-1,),  # 145: last_hidden_state
    negative_prompt="",  # 205
)

MINIMAX_H3 = Preset(
    name="minimax-h3",
    description="MiniMax-H3, text only (Qwen3-VL-32B).",
    source="diffusers: modular_pipelines/minimax_h3/encoders.py, get_qwen3vl_prompt_embeds",
    empty_prompt="<|endoftext|>",  # as in ComfyUI; the pipeline fails on a prompt without tokens
    add_special_tokens=False,  # 194
    max_sequence_length=4096,  # ours: the pipeline has no limit
    overlong="refused",
    padding="longest",  # ours: the pipeline takes one prompt, 188
    padding_rows="cut",
    layers=(49,),  # 35, 99: hidden_states[50]. By layer, since a checkpoint cut to 50 layers has its norm there (69)
    negative_prompt=None,
)

HDM = Preset(
    name="hdm",
    description="HDM, Home-made Diffusion Model (Qwen3-0.6B).",
    source="HDM: src/hdm/pipeline.py, __call__",
    closing_token="",
    max_sequence_length=512,  # ours: the pipeline has no limit; it was trained with 256 tokens
    overlong="refused",
    padding="longest",  # 82
    padding_rows="live",  # 91-94: all rows are taken; 132: the transformer gets them without a mask
    hidden_states=(-1,),  # 94: last_hidden_state
    negative_prompt=None,  # ours: 55 is an empty one, on which the model fails
)
