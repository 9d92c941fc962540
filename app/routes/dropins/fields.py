"""What the requests of several protocols have in common."""

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from app.request.schemas import Text
from encoder import DType


class DropInRequest(BaseModel):
    """A request of a foreign protocol. What it says beyond the fields known here is ignored, as its own server does."""

    model_config = ConfigDict(extra="ignore", strict=True)


def _as_list(value: object) -> object:
    """diffusers encodes the empty prompt where it is given None, and so do we where a client passes that None on."""
    if value is None:
        return [""]
    return [value] if isinstance(value, str) else value


_ONE_OR_MORE = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
Prompts = Annotated[list[Text], BeforeValidator(_as_list), WithJsonSchema(_ONE_OR_MORE)]

# Of such a client a user can set the address and nothing else, so what we need to know beside the prompt stands there.
PresetQuery = Annotated[str | None, Query(alias="preset", description="Name of a preset, see GET /presets.")]
DTypeQuery = Annotated[DType, Query(description="Of the numbers in the reply.")]
