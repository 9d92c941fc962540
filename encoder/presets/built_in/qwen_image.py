"""The systems that took over Qwen-Image's system turn: Krea 2, Iris-3B, DreamLite, Mage-Flow, JoyAI-Image.

How to read the numbers beside the fields: see the package's docstring.
"""

from dataclasses import replace

from encoder.presets.built_in.templates import ASSISTANT, END, USER
from encoder.presets.preset import Preset

DESCRIBE = (  # 34 tokens
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:" + END + USER
)

KREA_2 = Preset(
    name="krea-2",
    description="Krea 2 Raw and Turbo (Qwen3-VL-4B): 12 hidden states stacked behind the rows.",
    source="diffusers: pipelines/krea2/pipeline_krea2.py, get_text_hidden_states",
    prefix=DESCRIBE,  # 206-209
    closing_token="",
    tail=ASSISTANT,  # 210, 236-241: tokenized separately, and placed after the padding
    max_sequence_length=546,  # 217, 233: prefix and prompt are padded to 512 + 34 - 5 tokens, then come the tail's 5
    overlong="cut",  # 231
    padding="max_length",  # 232
    padding_rows="zero",  # 248: positions do not count padding, so real rows are those of an unpadded run; the
    # transformer masks the others (models/transformers/transformer_krea2.py)
    hidden_states=(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35),  # 189
    combine="stack_rows",  # 257: dim=2 -> (B, L, 12, D)
    dropped_rows=34,  # 211, 259
    negative_prompt="",  # 584
)

IRIS_3B = Preset(  # mflux's prompt_encoder.py agrees
    name="iris-3b",
    description="Iris-3B and Iris-3B Turbo (Qwen3-VL-4B): 12 hidden states stacked behind the rows.",
    source="Iris-3B: src/iris3b/text/qwen3_vl.py, Qwen3VLTextEncoder._run",
    aliases=("iris",),
    prefix=DESCRIBE,  # 14-19
    suffix=ASSISTANT,  # 20
    closing_token="",
    max_sequence_length=334,  # 155: 300, max_length of config.py, and the 34 of the prefix
    overlong="cut_prompt",  # 55-56, 116, 160-163: ids are joined, and the caption alone is cut
    padding="max_length",  # 156
    padding_rows="zero",  # 183: multiplied by the mask; only the first blocks have a mask, then the zeros count
    hidden_states=(2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35),  # hidden_layers of config.py, 180
    combine="stack_rows",  # 181: dim=2 -> (B, L, 12, D)
    dropped_rows=34,  # 180
    negative_prompt="",  # 194: null
)

DREAMLITE = Preset(
    name="dreamlite",
    description="DreamLite and DreamLite-mobile, text to image (Qwen3-VL-2B), as with transformers 5.",
    source="diffusers: pipelines/dreamlite/pipeline_dreamlite.py, encode_prompt",
    prefix=DESCRIBE + "[Generate]: ",  # 219-223, 490
    suffix=ASSISTANT,  # 222
    closing_token="",
    max_sequence_length=234,  # 404, 279: 200 + 34
    overlong="cut",  # 281
    padding="longest",  # 280
    padding_rows="cut",  # 290: rows are selected by the mask
    hidden_states=(-1,),  # 289: after the final norm since transformers 5
    dropped_rows=34,  # 224, 291
    negative_prompt="",  # 449
    negative_preset="dreamlite-negative",
)

DREAMLITE_NEGATIVE = replace(
    DREAMLITE,
    name="dreamlite-negative",
    description="The negative prompt of DreamLite, which has no [Generate] mark.",
    prefix=DESCRIBE,  # 490: the mark is put before the prompt alone
    negative_preset=None,
)

DREAMLITE_PRENORM = replace(
    DREAMLITE,
    name="dreamlite-prenorm",
    description="DreamLite as with transformers 4.57: the last layer without the final norm.",
    layers=(-1,),  # 289: before transformers 5, hidden_states[-1] of this class came before the final norm
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

MAGE_FLOW = Preset(  # ComfyUI's mage_flow.py and ai-toolkit agree, but ComfyUI cuts nothing
    name="mage-flow",
    description="Mage-Flow, text to image (Qwen3-VL-4B).",
    source="Mage: mage_flow/pipeline.py, _encode_texts_packed",
    prefix=DESCRIBE,  # PROMPT_TEMPLATE of models/utils.py
    suffix=ASSISTANT,  # PROMPT_TEMPLATE
    closing_token="",
    max_sequence_length=2082,  # 225, 745: 2048 + 34
    overlong="cut",  # 227
    padding="longest",  # ours, to join prompts of one request: 231 joins them without padding
    padding_rows="cut",
    hidden_states=(-1,),  # TextEncoder.forward of models/modules/text_encoder.py: last_hidden_state
    dropped_rows=34,  # PROMPT_TEMPLATE, 234
    negative_prompt=" ",  # 269, 328; a blank takes the place of an empty one
)

JOYIMAGE_EDIT = Preset(
    name="joyimage-edit",
    description="JoyImage-Edit without an input image, and JoyAI-Image (Qwen3-VL-8B).",
    source="diffusers: pipelines/joyimage/pipeline_joyimage_edit.py, _get_qwen_prompt_embeds",
    aliases=("joyai-image",),  # JoyAI-Image: src/modules/models/pipeline.py, the template "image"
    prefix=DESCRIBE.replace("system\n", "system\n \\n"),  # 156-160: a blank, a backslash and an n
    suffix=ASSISTANT,  # 159
    closing_token="",
    max_sequence_length=2082,  # 121, 255: 2048 + 34
    overlong="cut",  # 257
    padding="longest",  # 256
    padding_rows="cut",  # 268: rows are selected by the mask
    layers=(-1,),  # 202, 261: a hook takes the last layer's output, before the final norm
    dropped_rows=34,  # 169, 269: of the prefix's 36 tokens
    negative_prompt="",  # 751
)

JOYIMAGE_EDIT_PLUS = replace(  # 184-186: its template "multiple_images" has no user mark, which 587 adds
    JOYIMAGE_EDIT,
    name="joyimage-edit-plus",
    description="JoyImage-Edit-Plus without input images (Qwen3-VL-8B).",
    source="diffusers: pipelines/joyimage/pipeline_joyimage_edit_plus.py, encode_prompt_multiple_images",
    aliases=(),
    max_sequence_length=4130,  # 467, 257: 4096 + 34
    overlong="refused",  # ours: 258 keeps the last rows
    negative_prompt=" ",  # 610
)

JOYAI_VIDEO = replace(  # 758: its template "video", for several frames
    JOYIMAGE_EDIT,
    name="joyai-video",
    description="JoyAI-Image's pipeline for several frames (Qwen3-VL-8B).",
    source="JoyAI-Image: src/modules/models/pipeline.py, _get_qwen_prompt_embeds",
    aliases=(),
    prefix="<|im_start|>system\n \\nDescribe the video by detailing the following aspects:\n1. The main content and "
    "theme of the video.\n2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "\n3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.\n4. background "
    "environment, light, style and atmosphere.\n5. camera angles, movements, and transitions used in the video:"
    + END
    + USER,  # 170
    max_sequence_length=2139,  # 205: 2048 + 91, with text_token_max_length of src/infer_runtime/infer_config.py
    dropped_rows=91,  # 178, 215: of the prefix's 94 tokens
)
