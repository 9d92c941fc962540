"""What a pipeline does to its prompts before the template and the tokenizer."""

import html
import json
from typing import Any

Arguments = dict[str, Any]


def unchanged(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """Nothing."""
    return prompts


def clean_web_text(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """Broken encodings mended, HTML unescaped, blanks stripped. Source: pipeline_prx_pixel.py, _basic_clean.

    Errors: ModuleNotFoundError when ftfy is not installed.
    """
    try:
        import ftfy
    except ModuleNotFoundError as error:
        message = "PRX Pixel was trained on text that ftfy has cleaned, and ftfy is not installed: pip install ftfy."
        raise ModuleNotFoundError(message, name="ftfy") from error
    return [html.unescape(html.unescape(ftfy.fix_text(prompt))).strip() for prompt in prompts]


def clean_caption(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """JSON captions in the compact form of the training; other text as it is. Source: pipeline_bria_fibo2.py, __call__."""
    return [_clean_caption(prompt, pipe._parse_prompt(prompt)[0]) for prompt in prompts]


def _clean_caption(prompt: str, caption: Any) -> str:
    import json

    return caption if isinstance(caption, str) else json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)


def split_at_images(pipe: Any, prompts: list[str], more: Arguments) -> list[str]:
    """The segments of all prompts, the template among them, cut where an image stands.

    Source: pipeline_z_image_omni.py, _encode_prompt.
    """
    image = more.get("image")
    images = 0 if image is None else len(image) if isinstance(image, list) else 1
    return [segment for prompt in prompts for segment in _segments(prompt, images)]


def _segments(prompt: str, images: int) -> list[str]:
    start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    if images == 0:
        return [start + prompt + end]
    return [
        start + "<|vision_start|>",
        *["<|vision_end|><|vision_start|>"] * (images - 1),
        "<|vision_end|>" + prompt + end + "<|vision_start|>",
        "<|vision_end|><|im_end|>",
    ]
