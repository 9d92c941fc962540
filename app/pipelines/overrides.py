"""Pipelines of diffusers that take no embeds: their `encode_prompt` is replaced by one that asks the service.

Each function here makes such an `encode_prompt`, with the arguments and the result of the pipeline's own.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from app.embeds import Embeds, wire_dtype
from app.pipelines.forms import left_padded
from app.pipelines.plan import Prompts

Encode = Callable[..., Embeds]
Override = Callable[..., tuple[Any, ...]]


def override(pipe: Any, encode: Encode, preset: str | None) -> None:
    """Replace the pipeline's `encode_prompt`. `encode` is a client's, `preset` instead of the usual one.

    Errors: TypeError naming the classes for which this is possible.
    """
    for base in type(pipe).__mro__:
        if base.__name__ in OVERRIDES:
            pipe.encode_prompt = OVERRIDES[base.__name__](pipe, encode, preset)
            return
    raise TypeError(f"{type(pipe).__name__} cannot be patched; this can be done to {', '.join(OVERRIDES)}.")


def ideogram_4(pipe: Any, encode: Encode, preset: str | None) -> Override:
    """Source: pipelines/ideogram4/pipeline_ideogram4.py, encode_prompt."""
    import torch

    def encode_prompt(
        prompt: Prompts, grid_h: int, grid_w: int, max_sequence_length: int, device: Any
    ) -> tuple[Any, ...]:
        prompts = _list(prompt)
        embeds = encode(prompts, preset or "ideogram-4", max_sequence_length=max_sequence_length, dtype="float32")
        features = left_padded(embeds, len(prompts), lambda array: array.torch(device))
        missing = max_sequence_length - features.shape[1]
        features = torch.nn.functional.pad(features, (0, 0, missing, grid_h * grid_w))  # no text where the image stands
        return features, *pipe._prepare_ids(list(embeds.num_tokens), grid_h, grid_w, max_sequence_length, device)

    return encode_prompt


def ace_step(pipe: Any, encode: Encode, preset: str | None) -> Override:
    """Source: pipelines/ace_step/pipeline_ace_step.py, encode_prompt."""

    def encode_prompt(
        prompt: Prompts,
        lyrics: Prompts,
        device: Any,
        vocal_language: Prompts = "en",
        max_text_length: int = 256,
        max_lyric_length: int = 2048,
        **metas: Any,
    ) -> tuple[Any, ...]:
        prompts = _list(prompt)
        languages = [vocal_language] * len(prompts) if isinstance(vocal_language, str) else vocal_language
        formatted = [
            pipe._format_prompt(prompt=caption, lyrics=song, vocal_language=language, **metas)
            for caption, song, language in zip(prompts, _list(lyrics), languages, strict=True)
        ]
        captions, songs = zip(*formatted, strict=True)
        return (
            *encoded(captions, preset or "ace-step", max_text_length, device),
            *encoded(songs, "ace-step-lyrics", max_lyric_length, device),
        )

    def encoded(texts: Sequence[str], preset: str, window: int, device: Any) -> tuple[Any, Any]:
        dtype = pipe.transformer.dtype
        fields = {"prefix": "", "suffix": "", "max_sequence_length": window, "dtype": wire_dtype(dtype)}
        embeds = encode(texts, preset, **fields)
        return embeds.torch(device, dtype), embeds.attention_mask.torch(device)

    return encode_prompt


def dreamlite(pipe: Any, encode: Encode, preset: str | None) -> Override:
    """Source: pipelines/dreamlite/pipeline_dreamlite.py, encode_prompt, which gets its prompts with their marks."""
    import torch

    dropped_rows = pipe.prompt_template_encode_generate_start_idx
    pipe.text_encoder = SimpleNamespace(dtype=pipe.unet.dtype, device=pipe.device)  # the pipeline asks it for these

    def encode_prompt(
        mode: str,
        prompts: list[str],
        device: Any,
        dtype: Any,
        image: Any = None,
        max_sequence_length: int = 500,
        text_pad_embedding: Any = None,
    ) -> tuple[Any, ...]:
        if mode != "generate":
            raise ValueError("image: the text encoder of DreamLite looks at it, and the service cannot.")
        fields = {"max_sequence_length": max_sequence_length + dropped_rows, "dtype": wire_dtype(dtype)}
        embeds = encode(prompts, preset or "dreamlite-negative", **fields)
        hidden_states, mask = embeds.torch(device, dtype), embeds.attention_mask.torch(device)
        if text_pad_embedding is not None:
            hidden_states = torch.where(mask[..., None], hidden_states, text_pad_embedding.to(device, dtype))
        return hidden_states, mask.long()

    return encode_prompt


def _list(prompts: Prompts) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


OVERRIDES: dict[str, Callable[[Any, Encode, str | None], Override]] = {
    "Ideogram4Pipeline": ideogram_4,
    "AceStepPipeline": ace_step,
    "DreamLitePipeline": dreamlite,
    "DreamLiteMobilePipeline": dreamlite,
}
