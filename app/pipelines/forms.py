"""How embeds are handed to a pipeline, and what it takes beside them."""

from collections.abc import Callable
from typing import Any

from app.embeds import Array, Embeds

Arguments = dict[str, Any]
ToTensor = Callable[[Array], Any]  # on the device of the pipeline, in the dtype of its denoiser


def batch(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> Any:
    """One tensor for all prompts, padded as the preset pads."""
    return to_tensor(embeds.hidden_states)


def rows(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> list[Any]:
    """A tensor of real rows for each prompt."""
    return [to_tensor(embeds.rows(index)) for index in range(len(embeds))]


def segments(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> list[list[Any]]:
    """For each prompt the list of its segments, each a tensor of real rows."""
    tensors = rows(embeds, prompts, to_tensor)
    each = len(tensors) // prompts
    return [tensors[start : start + each] for start in range(0, len(tensors), each)]


def left_padded(embeds: Embeds, prompts: int, to_tensor: ToTensor) -> Any:
    """One tensor for all prompts, their real rows at its end."""
    import torch

    tensors = rows(embeds, prompts, to_tensor)
    length = max(len(tensor) for tensor in tensors)
    return torch.stack([torch.nn.functional.pad(tensor, (0, 0, length - len(tensor), 0)) for tensor in tensors])


def nothing(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """Nothing."""
    return {}


def t5_ids(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """The ids that Anima's adapter reads beside the embeds. Source: modular_pipelines/anima/encoders.py."""
    tokens = pipe.t5_tokenizer(
        prompts,
        padding="longest",
        max_length=more.get("max_sequence_length", 512),
        truncation=True,
        return_tensors="pt",
    ).to(pipe._execution_device)
    return {"t5_input_ids": tokens.input_ids, "t5_attention_mask": tokens.attention_mask}


def text_tags(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """A tag for each row that says it is text. Source: modular_pipelines/minimax_h3/encoders.py."""
    import torch

    return {"text_token_tags": torch.full((embeds.num_tokens[0],), pipe.text_tag, dtype=torch.long)}


def text_lengths(pipe: Any, prompts: list[str], embeds: Embeds, more: Arguments) -> Arguments:
    """How many rows of each prompt are real. Source: modular_pipelines/ideogram4/encoders.py."""
    return {"text_lengths": list(embeds.num_tokens)}
