"""The fields of requests and replies. Strict: neither "5" nor true is accepted as a number."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.request.fields import (
    LAYERS,
    PROMPTS,
    TIME,
    WINDOWS,
    HiddenStates,
    Layers,
    Milliseconds,
    PresetName,
    Text,
    Texts,
    Window,
)
from encoder import Catalog, DType, InvalidField, Preset

MAX_TEMPLATE_CHARS = 4096  # of prefix and of suffix, which are tokenized with every prompt of a request
Padding = Literal["preset", "longest", "max_length", "none"]


class TokenizeRequest(BaseModel):
    """One prompt or several, and how they are tokenized."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"allOf": [PROMPTS, WINDOWS, TIME]})

    prompt: Text | None = Field(None, description="One prompt. Exactly one of prompt and prompts is given.")
    prompts: Texts | None = Field(None, min_length=1, description="Several prompts.")
    preset: PresetName | None = Field(
        None, description="Name of a preset, see GET /presets; the server's default if unset."
    )
    max_sequence_length: Window | None = Field(None, description="Window in tokens; longer prompts are truncated.")
    padding: Padding = Field(
        "preset",
        description="`preset` pads as the preset does, `longest` to the longest prompt, `max_length` to the window; "
        "`none` delivers rows of real tokens only.",
    )
    prefix: Text | None = Field(
        None, max_length=MAX_TEMPLATE_CHARS, description="Replaces the preset's text before the prompt."
    )
    suffix: Text | None = Field(
        None, max_length=MAX_TEMPLATE_CHARS, description="Replaces the preset's text after the prompt."
    )
    timeout_ms: Milliseconds | None = Field(
        None,
        description="Time for the whole request from its first byte, in milliseconds; then it gets 504. The server's "
        "`request_timeout_s` if unset, and never more than that.",
    )

    def texts(self) -> list[str]:
        """The prompts.

        Errors: InvalidField unless exactly one of prompt and prompts is given.
        """
        if (self.prompt is None) == (self.prompts is None):
            raise InvalidField("prompt", "give exactly one of prompt (a string) and prompts (a list of strings).")
        return self.prompts if self.prompts is not None else [self.prompt or ""]

    def resolve(self, catalog: Catalog) -> Preset:
        """The preset that the request names, or the server's default, changed by the fields that the request sets."""
        preset = catalog.get(self.preset)
        given = {name: getattr(self, name) for name in ("max_sequence_length", "prefix", "suffix")}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.prefix is not None:
            changes["empty_prefix"] = None  # an empty prompt gets the request's prefix too
        return _pad(replace(preset, **changes) if changes else preset, self.padding)


def _pad(preset: Preset, padding: Padding) -> Preset:
    match padding:
        case "preset":
            return preset
        case "longest":
            return replace(preset, padding="longest")
        case "none":
            return replace(preset, padding="longest", padding_rows="cut")
        case "max_length":
            rows = "zero" if preset.padding_rows == "cut" else preset.padding_rows
            return replace(preset, padding="max_length", padding_rows=rows)


class EncodeRequest(TokenizeRequest):
    """Prompts to be encoded to the hidden states of a preset."""

    dtype: DType = Field("bfloat16", description="Dtype of the numbers in the reply.")


class EncodeLayersRequest(EncodeRequest):
    """Prompts to be encoded to the hidden states of chosen layers."""

    model_config = ConfigDict(json_schema_extra={"allOf": [PROMPTS, LAYERS, WINDOWS, TIME]})

    layers: Layers | None = Field(
        None, description="Decoder layers, 0-based, un-normed; -1 is the last. Exactly one of layers and hidden_states."
    )
    hidden_states: HiddenStates | None = Field(
        None, description="Hugging Face's index: 0 is the embedding output, -1 is after the final norm."
    )
    combine: Literal["concat", "stack"] = Field(
        "concat", description="`concat` joins features layer after layer, [B, L, n*D]; `stack` gives [B, n, L, D]."
    )

    def resolve(self, catalog: Catalog) -> Preset:
        """As for /encode, with the hidden states of this request in place of the preset's.

        Errors: InvalidField unless exactly one of layers and hidden_states is given.
        """
        if (self.layers is None) == (self.hidden_states is None):
            raise InvalidField("layers", "give exactly one of layers and hidden_states, a list of integers.")
        return replace(
            super().resolve(catalog),
            layers=tuple(self.layers) if self.layers is not None else None,
            hidden_states=tuple(self.hidden_states) if self.hidden_states is not None else None,
            combine=self.combine,
            unit_rms=False,
            bundle=1,
        )


class TensorBody(BaseModel):
    """A tensor: little-endian, in C order."""

    dtype: Literal["bfloat16", "float16", "float32", "bool"]
    shape: list[int]
    data: Any = Field(description="Bytes in msgpack; base64 in JSON, or nested lists with `?encoding=float`.")


class Usage(BaseModel):
    """What the request cost."""

    prompt_tokens: int
    layers_run: int = Field(description="Decoder layers that ran for the request; 0 if the cache had every result.")


class EncodeReply(BaseModel):
    """Hidden states of all prompts, padded on the right with zeros to the longest, and the mask of real rows."""

    model: str
    preset: str
    hidden_states: TensorBody
    attention_mask: TensorBody
    num_tokens: list[int]
    truncated: list[bool]
    usage: Usage


class TokenizedPromptBody(BaseModel):
    """A prompt as the model receives it, without padding."""

    text: str = Field(description="prefix + prompt + suffix.")
    input_ids: list[int]
    tokens: list[str]
    num_tokens: int
    truncated: bool


class TokenizeReply(BaseModel):
    """The tokens that would be encoded."""

    model: str
    preset: str
    prompts: list[TokenizedPromptBody]


class ErrorDetail(BaseModel):
    """What went wrong and what to do next."""

    code: str
    message: str
    hint: str | None = None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail
