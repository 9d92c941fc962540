"""The formats of a reply: which one the client asked for, and how it is built."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from app import wire
from app.errors import NotAcceptable, ResponseTooLarge
from app.profile import stage
from app.reply import torch_file
from app.reply.collate import collate, is_ragged
from app.reply.parts import PartsResponse
from app.request.accept import negotiate
from app.request.validation import shorten
from app.service import settings_of
from encoder import InvalidField, PromptEmbeds

Document = Mapping[str, Any]
LARGE_BYTES = 256 * 1024  # copying more than this holds up the event loop for a noticeable time

PACKERS: dict[str, Callable[[Document], wire.Parts]] = {
    wire.MSGPACK: wire.pack_parts,
    wire.X_MSGPACK: wire.pack_parts,
    wire.SAFETENSORS: wire.pack_safetensors_parts,
    wire.JSON: lambda document: [wire.pack_json(document)],
    wire.TENSOR: lambda document: [document["hidden_states"].tobytes()],
    torch_file.MEDIA_TYPE: lambda document: [torch_file.pack(document["hidden_states"])],
}
COPYING = (wire.JSON, torch_file.MEDIA_TYPE)  # the others send a tensor's own memory
MASKLESS = (wire.TENSOR, torch_file.MEDIA_TYPE)

ENCODINGS = ("base64", "float")


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """What the client asked for: a media type, and whether numbers in JSON are to be lists.

    Attributes:
        media_type: one of PACKERS.
        max_floats: so many numbers may be in lists; None has them as bytes.
    """

    media_type: str
    max_floats: int | None = None

    @classmethod
    def wanted(cls, request: Request) -> "ReplyFormat":
        """What the Accept header and `?encoding=` ask for. Errors: NotAcceptable, InvalidField."""
        query = request.query_params if request.scope["query_string"] else {}  # to parse nothing takes as long
        encoding = query.get("encoding", ENCODINGS[0])
        if encoding not in ENCODINGS:
            raise InvalidField("encoding", f"expected {' or '.join(ENCODINGS)}, found {shorten(encoding)}.")
        media_type = negotiate(request, tuple(PACKERS))
        lists = media_type == wire.JSON and encoding == "float"
        return cls(media_type, settings_of(request).max_json_floats if lists else None)

    async def respond(
        self, embeds: Sequence[PromptEmbeds], facts: Document, headers: Mapping[str, str] | None = None
    ) -> Response:
        """The hidden states and mask of all prompts in this format, with the facts about them where it has room.

        Args:
            headers: to send as well.
        Errors: ResponseTooLarge for more numbers in lists than allowed, NotAcceptable for rows that differ in number
        and a format without a mask.
        """
        self._check(embeds)
        large = self._copied_bytes(embeds) > LARGE_BYTES
        with stage("serialize"):
            reply = await asyncio.to_thread(self._build, facts, embeds) if large else self._build(facts, embeds)
        parts, own_headers = reply
        return PartsResponse(parts, {**own_headers, **(headers or {})}, self.media_type)

    def _copied_bytes(self, embeds: Sequence[PromptEmbeds]) -> int:
        """Bytes of hidden states that building the reply copies; none where one prompt's are sent as they lie."""
        if len(embeds) == 1 and self.media_type not in COPYING:
            return 0
        return sum(prompt.hidden_states.nbytes for prompt in embeds)

    def _check(self, embeds: Sequence[PromptEmbeds]) -> None:
        if self.media_type in MASKLESS and is_ragged(embeds):
            raise NotAcceptable(
                f"{self.media_type} has no mask, and these prompts have different numbers of rows.",
                "Send one prompt per request, take a preset that pads to its window, or accept application/msgpack.",
            )
        if self.max_floats is not None:
            check_floats(len(embeds) * max(prompt.hidden_states.size for prompt in embeds), self.max_floats)

    def _build(self, facts: Document, embeds: Sequence[PromptEmbeds]) -> tuple[wire.Parts, dict[str, str]]:
        """Body and headers. Safe on any thread."""
        hidden_states, attention_mask = collate(embeds)
        document = {**facts, "hidden_states": hidden_states, "attention_mask": attention_mask}
        headers = wire.tensor_headers(hidden_states) if self.media_type == wire.TENSOR else {}
        if self.max_floats is not None:
            return [wire.pack_json_floats(document)], headers
        return PACKERS[self.media_type](document), headers


def check_floats(numbers: int, allowed: int) -> None:
    """Refuse a reply of too many numbers in lists. Errors: ResponseTooLarge."""
    if numbers > allowed:
        raise ResponseTooLarge(
            f"encoding: float would be {numbers:,} numbers, allowed are {allowed:,}.",
            "Take base64, or accept application/msgpack.",
        )
