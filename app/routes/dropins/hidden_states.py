"""`POST /v1/hidden_states` and `/v1/hidden_states/structured`: one decoder layer, as heylookitsanllm serves it.

`layer` is a 0-based decoder layer, un-normed; negative values count from the end. It equals our `layers`, and is one
less than Hugging Face's index; -2 means the same layer in both. The reply to one text is [L, D] in float32.
Client: llm-dit-experiments, src/llm_dit/backends/api.py. Source: heylookitsanllm, hidden_states.py.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, WithJsonSchema
from starlette.responses import Response

from app import wire
from app.reply.json_parts import Part, in_base64, in_numbers, json_parts
from app.reply.reply import PartsResponse, check_numbers
from app.request.body import read_body
from app.request.deadline import deadline_of, limited
from app.request.disconnect import unless_disconnected
from app.request.fields import Layer, Text, Window
from app.request.query import QueryRoute
from app.routes.dropins.chat import Chat, sections
from app.routes.dropins.fields import DropInRequest, Prompts
from app.routes.encoding import encode_prompts, timings
from app.routes.openapi import drop_in
from app.service import Service, ServiceDep
from app.threads import BUILDER, on
from app.wire import Tensor, Written
from encoder import LAST_HIDDEN_STATE, Deadline, EncodeResult, Engine, InvalidField, Preset

router = APIRouter(route_class=QueryRoute)


MAX_MODEL_CHARS = 1000


def _short(name: str) -> str:
    """Refuse a long one. Pydantic's own check would refuse half a surrogate pair as well."""
    if len(name) > MAX_MODEL_CHARS:
        raise ValueError(f"has {len(name):,} characters, expected {MAX_MODEL_CHARS:,} at most")
    return name


ModelName = Annotated[str, AfterValidator(_short), Field(json_schema_extra={"maxLength": MAX_MODEL_CHARS})]


class LayerRequest(DropInRequest):
    """The fields of both routes."""

    model: ModelName | None = Field(None, description="Repeated in the reply; the service has one model.")
    layer: Layer = Field(-2, description="Decoder layer, 0-based, un-normed; -1 is the last.")
    max_length: Window = Field(512, description="Window in tokens; longer texts are truncated.")
    encoding_format: Literal["float", "base64"] = "float"

    def preset(self) -> Preset:
        """The bare text, no padding, one layer."""
        return replace(LAST_HIDDEN_STATE, layers=(self.layer,), hidden_states=None, max_sequence_length=self.max_length)


_ONE_TEXT = {
    "description": "One text, or a list of one, because a reply has room for one.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
        {"type": "null"},
    ],
}
OneText = Annotated[Prompts, WithJsonSchema(_ONE_TEXT)]


class HiddenStatesRequest(LayerRequest):
    """A text with the chat template already around it."""

    input: OneText
    return_attention_mask: bool = False

    def text(self) -> str:
        """The text. Errors: InvalidField unless there is exactly one, because a reply has room for one."""
        if len(self.input) != 1:
            raise InvalidField(
                "input",
                f"{len(self.input)} texts, this protocol takes one. Send one per request, or use POST /encode_layers.",
            )
        return self.input[0]


class StructuredRequest(LayerRequest):
    """The parts of a chat; the template is put around them here."""

    user_prompt: Text
    system_prompt: Text | None = None
    thinking_content: Text | None = None
    assistant_content: Text | None = None
    enable_thinking: bool = True
    return_token_boundaries: bool = False
    return_formatted_prompt: bool = False

    def chat(self) -> Chat:
        """The parts as a chat."""
        return Chat(
            user=self.user_prompt,
            system=self.system_prompt or "",
            thinking=self.thinking_content or "",
            assistant=self.assistant_content or "",
            enable_thinking=self.enable_thinking,
        )


class Section(BaseModel):
    """The tokens of a section: the first, and the one after the last."""

    start: int
    end: int


class HiddenStatesReply(BaseModel):
    """One text's hidden states (L, D)."""

    hidden_states: list[list[float]] | str = Field(description="Nested lists, or base64 of float32.")
    encoding_format: Literal["base64"] = Field("base64", description="Missing where hidden_states is nested lists.")
    shape: list[int]
    model: str
    layer: int
    dtype: Literal["float32"]
    attention_mask: list[int] = Field([], description="With return_attention_mask.")


class StructuredReply(HiddenStatesReply):
    """The same, and where the sections of the chat are."""

    token_boundaries: dict[str, Section] = Field({}, description="With return_token_boundaries.")
    token_counts: dict[str, int] = Field({}, description="With return_token_boundaries.")
    formatted_prompt: str = Field("", description="With return_formatted_prompt.")


HIDDEN_STATES = drop_in(
    HiddenStatesRequest,
    {"Z-Image's layer": {"input": "<|im_start|>user\na cat<|im_end|>\n", "layer": -2, "encoding_format": "base64"}},
    wire.JSON,
    HiddenStatesReply,
)
STRUCTURED = drop_in(
    StructuredRequest,
    {"with boundaries": {"user_prompt": "a cat", "system_prompt": "Be literal.", "return_token_boundaries": True}},
    wire.JSON,
    StructuredReply,
)


@router.post("/v1/hidden_states", **HIDDEN_STATES)
async def hidden_states(request: Request, service: ServiceDep) -> Response:
    """Encode one text to the output of one decoder layer."""
    body = await read_body(request, HiddenStatesRequest, service.settings)
    result = await encode_prompts(request, service, [body.text()], body.preset(), "float32")
    mask = result.embeds[0].attention_mask.astype(int).tolist()
    extra = {"attention_mask": mask} if body.return_attention_mask else {}
    return await _respond(request, service, body, result, extra)


@router.post("/v1/hidden_states/structured", **STRUCTURED)
async def structured(request: Request, service: ServiceDep) -> Response:
    """Encode a chat to the output of one decoder layer, and say which tokens each section has."""
    body = await read_body(request, StructuredRequest, service.settings)
    chat = body.chat()
    result = await encode_prompts(request, service, [chat.text], body.preset(), "float32")
    extra: dict[str, Any] = {}
    if body.return_token_boundaries:
        boundaries = _boundaries(chat, result, body.preset(), service.engine, deadline_of(request))
        extra |= await unless_disconnected(request, boundaries)
    if body.return_formatted_prompt:
        extra["formatted_prompt"] = chat.text
    return await _respond(request, service, body, result, extra)


async def _boundaries(
    chat: Chat, result: EncodeResult, preset: Preset, engine: Engine, deadline: Deadline
) -> dict[str, Any]:
    """token_boundaries and token_counts.

    A turn ends where a special token begins, so the first turns have the same tokens alone as in the whole chat.
    """
    heads = await engine.tokenize([chat.system_turn, chat.system_turn + chat.user_turn], preset, deadline)
    system_end, user_end = (len(head.input_ids) for head in heads)
    tokens = engine.tokens(result.prompts[0].input_ids)
    found = sections(chat, system_end, user_end, tokens)
    return {
        "token_boundaries": {name: {"start": start, "end": end} for name, (start, end) in found.items()},
        "token_counts": {name: end - start for name, (start, end) in found.items()} | {"total": len(tokens)},
    }


async def _respond(
    request: Request, service: Service, body: LayerRequest, result: EncodeResult, extra: dict[str, Any]
) -> Response:
    [embeds] = result.embeds
    tensor = Tensor(embeds.hidden_states, embeds.dtype)
    facts = {"model": body.model or service.engine.info.model, "layer": body.layer, "dtype": embeds.dtype} | extra
    if body.encoding_format == "float":
        check_numbers(tensor.array.size, service.settings.max_json_floats)
        async with limited(deadline_of(request), "reply"):
            parts = await on(BUILDER, _in_numbers, tensor, facts)
    else:
        parts = json_parts(_document(in_base64(tensor), tensor, {"encoding_format": "base64"} | facts))
    return PartsResponse(parts, timings(result), wire.JSON)


def _in_numbers(tensor: Tensor, facts: dict[str, Any]) -> list[Part]:
    return json_parts(_document(in_numbers(tensor), tensor, facts))


def _document(hidden_states: Written, tensor: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_states": hidden_states, "shape": list(tensor.array.shape)} | facts
