"""What a pipeline does to its prompts before the tokenizer sees them.

Args of each function:
    pipe: the pipeline.
    prompts: as the caller gives them.
    more: the other arguments of the call.
Returns: what the service is asked to encode.
"""

import html
import json
from typing import Any

Arguments = dict[str, Any]


def unchanged(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """The prompts themselves."""
    return prompts


def clean_web_text(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """Broken encodings mended, HTML unescaped, blanks stripped.

    Errors: ModuleNotFoundError when ftfy, with which the pipeline does it, is not installed.
    Source: diffusers, pipelines/prx/pipeline_prx_pixel.py, _basic_clean.
    """
    try:
        import ftfy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PRX Pixel needs its prompts cleaned by ftfy: pip install ftfy.", name="ftfy"
        ) from error
    return [html.unescape(html.unescape(ftfy.fix_text(prompt))).strip() for prompt in prompts]


def clean_captions(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """JSON captions in the compact form that Fibo 2 was trained on; other text as it is.

    Source: diffusers, pipelines/bria_fibo2/pipeline_bria_fibo2.py, __call__.
    """
    captions = [pipe._parse_prompt(prompt)[0] for prompt in prompts]
    return [
        caption if isinstance(caption, str) else json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)
        for caption in captions
    ]


def cut_at_images(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """The segments of all prompts one after the other: the whole template, cut where an image stands.

    Source: diffusers, pipelines/z_image/pipeline_z_image_omni.py, _encode_prompt.
    """
    image = more.get("image")
    images = 0 if image is None else len(image) if isinstance(image, list) else 1
    return [segment for prompt in prompts for segment in _segments(prompt, images)]


def _segments(prompt: str, images: int) -> list[str]:
    user, assistant = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    if images == 0:
        return [user + prompt + assistant]
    return [
        user + "<|vision_start|>",
        *["<|vision_end|><|vision_start|>"] * (images - 1),
        "<|vision_end|>" + prompt + assistant + "<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]
