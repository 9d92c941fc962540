"""The types of fields in requests, and what their schemas say."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

BOUND = "x-bound"  # in the schema of a field whose bounds the settings and the model say, see app/routes/described.py


def _encodable(text: str) -> str:
    """Refuse half a surrogate pair: JSON can escape one, but it is no character and UTF-8 cannot encode it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"has a lone surrogate at character {error.start}, expected Unicode text") from error
    return text


def _distinct(indices: list[int]) -> list[int]:
    if len(set(indices)) < len(indices):
        raise ValueError("has an index twice, expected each once")
    return indices


def _whole(value: object) -> object:
    """A whole number is an integer, however it is written: 77, 77.0 and 7.7e1 are one in JSON Schema and JavaScript.

    From 2^53 on, a float is not exactly what was written.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
PresetName = Annotated[str, Field(json_schema_extra={BOUND: "presets"})]
Window = Annotated[int, Field(ge=1, json_schema_extra={BOUND: "window"}), BeforeValidator(_whole)]
Milliseconds = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Layer = Annotated[int, Field(json_schema_extra={BOUND: "layers"}), BeforeValidator(_whole)]
HiddenState = Annotated[int, Field(json_schema_extra={BOUND: "hidden_states"}), BeforeValidator(_whole)]
_EACH_ONCE = Field(min_length=1, fail_fast=True, json_schema_extra={"uniqueItems": True})
Layers = Annotated[list[Layer], _EACH_ONCE, AfterValidator(_distinct)]
HiddenStates = Annotated[list[HiddenState], _EACH_ONCE, AfterValidator(_distinct)]


def _exactly_one(first: str, first_type: str, second: str, second_type: str) -> dict[str, JsonValue]:
    """JSON schema: exactly one of two fields is given. Null is as if it were not."""

    def given(name: str, kind: str, other: str) -> JsonValue:
        return {"required": [name], "properties": {name: {"type": kind}, other: {"type": "null"}}}

    return {"oneOf": [given(first, first_type, second), given(second, second_type, first)]}


PROMPTS = _exactly_one("prompt", "string", "prompts", "array")
LAYERS = _exactly_one("layers", "array", "hidden_states", "array")
TIME: dict[str, JsonValue] = {  # enough for any request; see app/routes/described.py
    "not": {"required": ["timeout_ms"], "properties": {"timeout_ms": {"type": "integer", "maximum": 9999}}}
}
WINDOWS: dict[str, JsonValue] = {BOUND: "windows"}  # those that suit the preset
