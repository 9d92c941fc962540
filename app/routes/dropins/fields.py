"""Fields that the requests of several protocols share."""

from typing import Annotated

from fastapi import Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from app.request.fields import BOUND, Texts
from encoder import DType


class DropInRequest(BaseModel):
    """A request of another service's protocol. Fields unknown here are ignored, as that service ignores them."""

    model_config = ConfigDict(extra="ignore", strict=True)


def _as_list(value: object) -> object:
    """A list of prompts. None becomes the empty prompt, as in diffusers, whose clients may pass their None on."""
    if value is None:
        return [""]
    return [value] if isinstance(value, str) else value


_LIST = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_ONE_OR_MORE = {
    "description": "One prompt or several. Several must have the same number of rows where the reply has no mask.",
    "anyOf": [{"type": "string"}, _LIST | {"not": {"minItems": 2}}, {"type": "null"}],  # see app/routes/described.py
}
Prompts = Annotated[Texts, BeforeValidator(_as_list), WithJsonSchema(_ONE_OR_MORE)]

# In such a client a user can set nothing but the address, so the query of the address carries what else we need.
_PRESET = {"type": "string", BOUND: "presets"}
PresetQuery = Annotated[
    str | None, WithJsonSchema(_PRESET), Query(alias="preset", description="Name of a preset, see GET /presets.")
]
DTypeQuery = Annotated[DType, Query(description="Dtype of the numbers in the reply.")]
