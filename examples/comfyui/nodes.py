"""The node, and how its conditioning is made."""

import contextlib
import functools
from typing import Any

import torch

from .remote import DEFAULT_SERVER, EncoderError, encode, served
from .systems import SYSTEMS, System

NO_WINDOW = {"padding": "none", "max_sequence_length": 8192}  # ComfyUI truncates nothing; this is the service's limit
Conditioning = list[list[Any]]


class Qwen3EncoderRemote:
    """Encodes a prompt and its negative as CLIPTextEncode does with the system's own text encoder."""

    DESCRIPTION = "Encodes prompts by a qwen3-encoder service instead of a text encoder loaded here."
    CATEGORY = "conditioning"
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")

    _served: dict[str, str] = {}  # noqa: RUF012 - by server, what it served when it was last reached

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, in the order in which they are shown."""
        text = {"multiline": True, "dynamicPrompts": True}
        return {
            "required": {
                "server": ("STRING", {"default": DEFAULT_SERVER, "tooltip": "Where the service listens."}),
                "preset": (list(SYSTEMS), {"tooltip": "The diffusion system that the conditioning is for."}),
                "prompt": ("STRING", text),
                "negative": ("STRING", text | {"tooltip": "Used where the sampler's cfg is over 1."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, server: str | None = None, **inputs: Any) -> str:  # noqa: ARG003  # ComfyUI passes all inputs
        """Which checkpoint is served: ComfyUI encodes again when another one is.

        A server that cannot be reached leaves valid what it made before. An address that another node yields is not
        known yet, and is not asked.
        """
        if server is None:
            return ""
        with contextlib.suppress(EncoderError):
            cls._served[server] = served(server)
        return cls._served.get(server, "")

    def encode(self, server: str, preset: str, prompt: str, negative: str) -> tuple[Conditioning, Conditioning]:
        """The conditioning of both. Errors: EncoderError."""
        return conditioning(server, preset, prompt), conditioning(server, preset, negative)


def conditioning(server: str, preset: str, prompt: str) -> Conditioning:
    """What ComfyUI's CLIPTextEncode yields for a prompt.

    Errors: EncoderError.
    """
    system = SYSTEMS[preset]
    text = prompt.replace("\\(", "(").replace("\\)", ")")  # comfy/sd1_clip.py unescapes them in every prompt
    t5: dict[str, Any] = {}
    if system.extra == "t5xxl":
        text, t5 = _with_t5(prompt)
    fields = {"prompt": text, "preset": preset, "dtype": "float32"} | _template(system, preset, text)
    rows, attention_mask = _encode(server, fields, system)

    beside: dict[str, Any] = {"pooled_output": None}
    if system.attention_mask:
        beside["attention_mask"] = attention_mask
    if system.extra == "minimax_token_tags":
        beside["minimax_token_tags"] = torch.ones(rows.shape[1], dtype=torch.long)  # 1 is text
    return [[rows, beside | t5]]


def _encode(server: str, fields: dict[str, Any], system: System) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows, (1, rows, features) float32, and their mask, (1, rows) int64."""
    rows, mask, truncated = encode(server, fields if system.fills_window else fields | NO_WINDOW)
    if truncated and system.fills_window:
        rows, mask, truncated = encode(server, fields | NO_WINDOW)
    if truncated:
        raise EncoderError(f"prompt: longer than {NO_WINDOW['max_sequence_length']} tokens.")
    if system.stacked:
        rows = rows.flatten(2)  # (1, rows, n, D) to (1, rows, n * D)
    return rows, mask.long()


def _template(system: System, preset: str, text: str) -> dict[str, str]:
    """Fields that take the place of the preset's template, where ComfyUI uses another.

    Errors: EncoderError where ComfyUI would drop other rows of it than the service does.
    """
    if not text and system.empty is not None:
        return {"prompt": system.empty, "suffix": ""}
    if not system.whole_templates or not text.startswith("<|im_start|>"):
        return {}
    if system.dropped:
        raise EncoderError(f"prompt: {preset} has a template of its own; give the text without <|im_start|>.")
    return {"prefix": "", "suffix": ""}


def _with_t5(prompt: str) -> tuple[str, dict[str, Any]]:
    """The text without weights, and T5's ids and weights, which Anima reads too. By the tokenizer that ComfyUI ships.

    Errors: EncoderError outside ComfyUI.
    """
    try:
        from comfy import sd1_clip
    except ImportError as error:
        raise EncoderError("anima: needs the T5 tokenizer of ComfyUI, in which this does not run.") from error
    segments = sd1_clip.token_weights(sd1_clip.escape_important(prompt), 1.0)
    text = sd1_clip.unescape_important("".join(segment for segment, _ in segments))
    tokens = _anima_tokenizer().t5xxl.tokenize_with_weights(prompt)[0]
    extra: dict[str, Any] = {
        "t5xxl_ids": torch.tensor([token for token, _ in tokens], dtype=torch.int),
        "t5xxl_weights": torch.tensor([weight for _, weight in tokens]),
    }
    if not text:  # ComfyUI encodes one padding token, and masks it
        return "<|endoftext|>", extra | {"attention_mask": torch.zeros(1, 1, dtype=torch.long)}
    return text, extra


@functools.cache
def _anima_tokenizer() -> Any:
    from comfy.text_encoders.anima import AnimaTokenizer

    return AnimaTokenizer()
