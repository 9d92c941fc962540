"""What embeds are handed to a pipeline as, and what it takes beside them."""

from collections.abc import Callable
from typing import Any

from app.embeds import Array, Embeds

Arguments = dict[str, Any]
ToTensor = Callable[[Array], Any]  # on the device of the pipeline, in the dtype that it wants


def batch(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> Any:
    """One tensor for all prompts, padded as the preset pads."""
    return to_tensor(embeds.hidden_states)


def rows(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> list[Any]:
    """For each prompt a tensor of its real rows."""
    return [to_tensor(embeds.rows(index)) for index in range(len(embeds))]


def segments(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> list[list[Any]]:
    """For each prompt the list of its segments, each a tensor of real rows."""
    tensors = rows(embeds, prompts, to_tensor)
    count = len(tensors) // prompts
    return [tensors[start : start + count] for start in range(0, len(tensors), count)]


def left_padded(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> Any:
    """One tensor for all prompts, with zeros in front of the shorter ones."""
    import torch

    tensors = rows(embeds, prompts, to_tensor)
    length = max(len(tensor) for tensor in tensors)
    return torch.stack([torch.nn.functional.pad(tensor, (0, 0, length - len(tensor), 0)) for tensor in tensors])


def nothing(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """No further argument."""
    return {}


def t5_ids(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """The ids of the same prompts for Anima's adapter, by the call's `t5_tokenizer`, or the pipeline's.

    Errors: TypeError when neither has one; the pipeline's goes with its block `text_encoder`.
    Source: diffusers, modular_pipelines/anima/encoders.py, _get_t5_prompt_ids.
    """
    tokenizer = more.get("t5_tokenizer", getattr(pipe, "t5_tokenizer", None))
    if tokenizer is None:
        raise TypeError("t5_tokenizer: Anima reads the prompt as T5's ids too. Give the tokenizer of its checkpoint.")
    window = more.get("max_sequence_length", 512)
    tokens = tokenizer(prompts, padding="longest", max_length=window, truncation=True, return_tensors="pt")
    device = pipe._execution_device
    return {"t5_input_ids": tokens.input_ids.to(device), "t5_attention_mask": tokens.attention_mask.to(device)}


def text_tags(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """For each row the tag that it is text.

    Source: diffusers, modular_pipelines/minimax_h3/encoders.py, MiniMaxH3TextEncoderStep.
    """
    import torch

    return {"text_token_tags": torch.full(embeds.num_tokens, pipe.text_tag, dtype=torch.long)}


def text_lengths(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """How many rows of each prompt are real.

    Source: diffusers, modular_pipelines/ideogram4/encoders.py, Ideogram4TextEncoderStep.
    """
    return {"text_lengths": list(embeds.num_tokens)}


def no_image_pads(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """For each row that it is not an image's.

    Source: diffusers, modular_pipelines/qwenimage21/encoders.py, QwenImage21TextEncoderStep.
    """
    import torch

    shape = embeds.attention_mask.array.shape
    return {"image_pad_mask": torch.zeros(shape, dtype=torch.bool, device=pipe._execution_device)}
