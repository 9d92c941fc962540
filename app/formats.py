"""The formats of a reply: which one the client asked for, and how it is built."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request
from starlette.responses import Response

from app import wire
from app.errors import NotAcceptable, ResponseTooLarge
from app.negotiation import negotiate
from app.wire import Tensor

Document = Mapping[str, Any]
LARGE_BYTES = 256 * 1024  # building more than this holds up the event loop for a noticeable time

PACKERS: dict[str, Callable[[Document], bytes]] = {
    wire.MSGPACK: wire.pack,
    wire.X_MSGPACK: wire.pack,
    wire.SAFETENSORS: wire.pack_safetensors,
    wire.JSON: wire.pack_json,
    wire.TENSOR: lambda document: wire.pack_tensor(document["hidden_states"]),
}


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """What the client asked for: a media type, and whether numbers in JSON are to be lists."""

    media_type: str
    floats: bool

    async def respond(self, document: Document, ragged: bool, max_json_floats: int) -> Response:
        """The document in this format.

        Args:
            document: of `hidden_states`, `attention_mask`, and what is said about them.
            ragged: whether the mask is needed to tell padding from rows.
            max_json_floats: limit on the numbers in lists.
        Errors: ResponseTooLarge over that limit, NotAcceptable for ragged rows in a format without a mask.
        """
        hidden_states: Tensor = document["hidden_states"]
        if self.media_type == wire.TENSOR and ragged:
            raise NotAcceptable(
                f"accept: {wire.TENSOR} has no mask, and these prompts have different numbers of rows.",
                "Send one prompt per request, set padding to max_length, or accept application/msgpack.",
            )
        if self.floats and hidden_states.array.size > max_json_floats:
            raise ResponseTooLarge(
                f"encoding: float would be {hidden_states.array.size:,} numbers, allowed are {max_json_floats:,}.",
                "Leave encoding out for base64, or accept application/msgpack.",
            )
        pack = wire.pack_json_floats if self.floats else PACKERS[self.media_type]
        large = hidden_states.array.nbytes > LARGE_BYTES
        body = await asyncio.to_thread(pack, document) if large else pack(document)
        headers = wire.tensor_headers(hidden_states) if self.media_type == wire.TENSOR else None
        return Response(body, headers=headers, media_type=self.media_type)


def reply_format(
    request: Request,
    encoding: Annotated[
        Literal["base64", "float"], Query(description="How a JSON reply holds tensors; other formats ignore it.")
    ] = "base64",
) -> ReplyFormat:
    """The format that the Accept header and `?encoding=` ask for, found before any work is done."""
    media_type = negotiate(request, tuple(PACKERS))
    return ReplyFormat(media_type, floats=media_type == wire.JSON and encoding == "float")


ReplyFormatDep = Annotated[ReplyFormat, Depends(reply_format)]
