"""The formats of a reply, one entry each. Everything else follows from this table: what the Accept header may ask for,
the API description, and how a reply is built and sent. Recipe: docs/adding-a-reply-format.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app import wire
from app.reply import torch_file
from app.reply.json_parts import Part, in_numbers, json_parts

Document = Mapping[str, Any]
Body = Sequence[Part]  # in pieces, a tensor's own memory among them


def no_headers(document: Document) -> dict[str, str]:
    """Most formats need no headers of their own."""
    return {}


@dataclass(frozen=True, slots=True)
class Format:
    """One format of a reply.

    Attributes:
        media_type: the name under which the Accept header asks for it.
        pack: turns a document into the parts of a body. A document has the Tensors `hidden_states` (B, L, D) and
            `attention_mask` (B, L), and facts about the request: model, preset, num_tokens, truncated, usage.
        has_mask: whether the body carries the attention mask. Without it, prompts of different lengths are refused.
        copies: whether `pack` copies the hidden states, or reads them all. With large ones it then runs on a thread.
        headers: response headers that describe the body.
        max_numbers: limit on the numbers in the reply; None where they travel as bytes.
    """

    media_type: str
    pack: Callable[[Document], Body]
    has_mask: bool = True
    copies: bool = False
    headers: Callable[[Document], dict[str, str]] = no_headers
    max_numbers: int | None = None


def pack_json(document: Document) -> Body:
    """JSON, tensors in base64."""
    return json_parts(document)


def pack_json_floats(document: Document) -> Body:
    """JSON, tensors as nested lists of numbers; large and slow, for reading by eye."""
    return json_parts(document, in_numbers)


def pack_tensor(document: Document) -> Body:
    """The bytes of the hidden states alone."""
    return [document["hidden_states"].tobytes()]


def pack_torch(document: Document) -> Body:
    """The hidden states alone, as `torch.save` writes them."""
    return torch_file.pack_parts(document["hidden_states"])


def describe_tensor(document: Document) -> dict[str, str]:
    """Shape and dtype of the hidden states."""
    return wire.tensor_headers(document["hidden_states"])


# When the Accept header leaves a choice, the first in this order wins.
FORMATS = {
    entry.media_type: entry
    for entry in (
        *(Format(media_type, wire.pack_parts) for media_type in wire.MSGPACKS),
        Format(wire.SAFETENSORS, wire.pack_safetensors_parts),
        Format(wire.JSON, pack_json),
        Format(wire.TENSOR, pack_tensor, has_mask=False, headers=describe_tensor),
        Format(torch_file.MEDIA_TYPE, pack_torch, has_mask=False, copies=True),
    )
}
JSON_FLOATS = Format(wire.JSON, pack_json_floats, copies=True)  # asked for by ?encoding=float
