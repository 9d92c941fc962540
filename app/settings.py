"""All settings, in one place. Each is an environment variable and a command line flag of the same name.

The rest of the package receives their values as arguments.
"""

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from encoder import (
    BUILT_IN,
    Catalog,
    ComputeDType,
    EncoderError,
    Limits,
    Lora,
    ModelOptions,
    Preset,
    Quantize,
    read_presets,
)

PREFIX = "QWEN3_ENCODER_"
MIB = 1024 * 1024
GIB = 1024 * MIB

KEYS = ("api_key", "api_key_file")  # a service that should ask for a key must not start without one
HOST_NAME = re.compile(r"[\w.~-]{1,255}", re.ASCII)
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@,]{1,300}", re.ASCII)

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _split(value: object) -> object:
    """A list is given as one string, separated by commas."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _without_secrets(source: object) -> object:
    """An address as it may be shown: without user, password and query, which may hold a token of the hub."""
    if isinstance(source, tuple):
        return tuple(map(_without_secrets, source))
    if not isinstance(source, str) or "://" not in source or source.lower().startswith("file:"):
        return source
    without_query = re.sub(r"[?#].*?(?=(:[\d.]+)?$)", "", source)  # the scale of a LoRA stays
    return re.sub(r"//[^/]*@", "//", without_query)


def _not_blank(key: SecretStr | None) -> SecretStr | None:
    """The key as a header can carry it: without the line end of the file that it was read from.

    An empty key is refused, not dropped: a service that should ask for a key must not start without one.
    """
    if key is None:
        return None
    stripped = key.get_secret_value().strip()
    if not stripped:
        raise ValueError("is set and empty, expected a key. Give it one, or unset it to serve without a key.")
    if not stripped.isprintable():
        raise ValueError("has a control character, or is not UTF-8, which no header can carry.")
    return SecretStr(stripped)


def _named(file: object) -> object:
    """An empty name is refused like an empty key."""
    if isinstance(file, str) and not file.strip():
        raise ValueError("is set and empty, expected a file with a key on each line. Unset it to serve without a key.")
    return file


def _hosts(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names as they stand in the Host header, without the port. Errors: ValueError."""
    names = tuple(name.lower().removesuffix(".") for name in names)
    if wrong := next((name for name in names if name != "*" and not HOST_NAME.fullmatch(name)), None):
        raise ValueError(f"{wrong!r:.80} is no host name. Give names without scheme and port, or * for any")
    return names


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers write them. Errors: ValueError."""
    origins = tuple(origin.lower().removesuffix("/") for origin in origins)
    if wrong := next((origin for origin in origins if not ORIGIN.fullmatch(origin)), None):
        raise ValueError(
            f"{wrong!r:.80} is no origin. Give scheme, host and port, as http://localhost:3000, or * for any"
        )
    return origins


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The values without empty ones, which mean "not set": compose writes `${X:-}` as an empty variable."""
    return {
        name: value for name, value in values.items() if name in KEYS or not isinstance(value, str) or value.strip()
    }


class Settings(BaseSettings):
    """Each description says what the value means and its unit; docs/settings.md is made from it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True)

    model: Annotated[str, BeforeValidator(_without_secrets)] = Field(
        default="demo",
        description="`demo`, a folder, a `.safetensors` or `.gguf` file, a Hugging Face id or an Ollama name.",
    )
    revision: str | None = Field(default=None, description="Commit, branch or tag of a Hugging Face id.")
    tokenizer: Annotated[str | None, BeforeValidator(_without_secrets)] = Field(
        default=None,
        description="`tokenizer.json`, a folder or a Hugging Face id; unset uses the checkpoint's own tokenizer.",
    )
    lora: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_without_secrets), BeforeValidator(_split)] = Field(
        default=(),
        description="LoRAs of the text encoder, separated by commas: each a folder, a file or a Hugging Face id, and "
        "after a colon its scale, as `style.safetensors:0.8`.",
    )
    component: str | None = Field(
        default=None,
        description="Which Qwen3 to take where a file or folder holds several: a part of its keys' prefix, or the name "
        "of its folder; unset expects one.",
    )
    rope_theta: float | None = Field(
        default=None,
        gt=1,
        le=1e12,
        description="Base of RoPE's frequencies, for checkpoints that do not say it: 1000000 for Qwen3, 5000000 for "
        "Qwen3-VL; unset takes the checkpoint's own, or what its tensors and names tell.",
    )
    quantize: Quantize = Field(
        default="auto",
        description="Bits or format of the weights in memory. `keep` leaves them as stored, `none` dequantizes; "
        "`auto` is `keep` on a GPU and `none` on a CPU.",
    )
    num_layers: int | None = Field(
        default=None,
        gt=0,
        description="Number of decoder layers to load; unset loads those that `only_presets` need, or all.",
    )
    compute_dtype: ComputeDType = Field(
        default="auto",
        description="Dtype of the computation; `auto` is the checkpoint's dtype on a GPU and float32 on a CPU.",
    )
    force_float16: bool = Field(
        default=False, description="Allow the compute dtype float16, in which Qwen3 can overflow."
    )
    cache_dir: Path | None = Field(default=None, description="Folder for downloads; unset uses Hugging Face's default.")
    presets: Path | None = Field(
        default=None, description="TOML file with your own presets, in addition to the built-in ones."
    )
    only_presets: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(),
        description="Presets to serve, separated by commas; unset serves all. Only the layers that they need are "
        "loaded: 27 of 36 for FLUX.2 klein.",
    )
    default_preset: str | None = Field(
        default=None,
        description="Preset for requests that name none; unset uses the first of `only_presets`, or else the last "
        "hidden state of the bare prompt.",
    )
    predict_preset: str = Field(
        default="flux2-klein", description="Preset for `POST /predict` if its address names none."
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    uds: Path | None = Field(default=None, description="Unix socket to listen on instead of host and port.")
    api_key: Annotated[SecretStr | None, AfterValidator(_not_blank)] = Field(
        default=None,
        description="Bearer token that every route except `/livez` and `/readyz` requires; unset requires none. "
        "As a flag it is visible to all users of the machine: prefer the variable, or a file.",
    )
    api_key_file: Annotated[Path | None, BeforeValidator(_named)] = Field(
        default=None,
        description="File with such tokens, each on a line of its own; lines that begin with # are none. SIGHUP reads "
        "it again.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_hosts)] = Field(
        default=(),
        description="Names allowed in the Host header besides `localhost`, `host` and IP addresses, separated by "
        "commas; `*` allows any. On a Unix socket unset allows any.",
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_origins)] = Field(
        default=(),
        description="Origins whose web pages may use the service, separated by commas, as `http://localhost:3000`; "
        "`*` allows any. Unset allows only pages that the service or its proxy delivers.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="`json` logs one object for each line, with the fields of docs/operating.md."
    )
    profile: bool = Field(
        default=False, description="Log how long each stage of a request took, and a summary at shutdown."
    )

    max_body_bytes: Positive = Field(default=2_000_000, description="Maximum size of a request body, in bytes.")
    max_prompts: Positive = Field(default=64, description="Maximum number of prompts in one request.")
    max_prompt_chars: Positive = Field(
        default=32_000, description="Maximum length of one prompt with its template, in characters."
    )
    max_sequence_length: Positive = Field(default=8192, description="Maximum window of a request, in tokens.")
    max_output_bytes: Positive = Field(default=256 * MIB, description="Maximum size of one request's result, in bytes.")
    max_json_floats: Positive = Field(default=1_000_000, description="Maximum numbers in a reply to `?encoding=float`.")
    max_tokenizing_chars: Positive = Field(
        default=8_000_000,
        description="Maximum characters waiting for the tokenizer, with templates; requests beyond that get 429.",
    )
    max_queue_tokens: Positive = Field(
        default=65_536,
        description="Maximum tokens waiting for the model, including padding; requests beyond that get 429.",
    )
    max_arriving_bytes: Positive = Field(
        default=64 * MIB,
        description="Maximum bytes of requests, heads and bodies, until their replies begin; the first 16 KiB of each "
        "do not count. Requests beyond that get 429.",
    )
    max_reply_bytes: Positive = Field(
        default=GIB,
        description="Maximum bytes of results and replies that are planned, computed or being sent; requests beyond "
        "that get 429. Replies that make no progress are given up first.",
    )
    max_connections: Positive = Field(
        default=1000, description="Maximum number of open connections; those beyond that get 503."
    )
    max_batch_tokens: Positive = Field(default=4096, description="Maximum tokens in a forward pass, including padding.")
    cache_bytes: int = Field(default=512 * MIB, ge=0, description="Memory for cached results, in bytes; 0 caches none.")
    disk_cache_dir: Path | None = Field(
        default=None, description="Folder for cached results that outlive the process; unset stores none."
    )
    disk_cache_bytes: Positive = Field(default=10 * GIB, description="Maximum size of that folder, in bytes.")

    request_timeout_s: Seconds = Field(
        default=300,
        description="Maximum time from the first byte of a request until its reply is built, in seconds; then it gets "
        "504. A request may ask for less, by `timeout_ms`.",
    )
    body_timeout_s: Seconds = Field(
        default=30,
        description="Maximum time for a request body to arrive, in seconds; then the request gets 408.",
    )
    header_timeout_s: Seconds = Field(
        default=10,
        description="Maximum time for a request's target and headers to arrive, and for a new connection to send "
        "anything, in seconds; then the connection is closed, after 408 if something has come.",
    )
    idle_timeout_s: Seconds = Field(
        default=75, description="Maximum time between two requests of a connection, in seconds; then it is closed."
    )
    write_timeout_s: Seconds = Field(
        default=60,
        description="Maximum time for a client to read a whole reply, however large, in seconds; then the connection "
        "is reset.",
    )
    stall_s: Seconds = Field(
        default=120,
        description="Maximum time of one step of a forward pass, tokenizer, event loop or worker thread, in seconds; "
        "beyond it the step is taken to hang, all requests get 503, and the process ends with exit code 3. A forward "
        "pass may take longer where others of its size did.",
    )
    drain_timeout_s: Seconds = Field(
        default=30, description="Maximum wait for accepted requests at shutdown, in seconds."
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_set(cls, values: dict[str, Any]) -> dict[str, Any]:
        return _given(values)

    @model_validator(mode="after")
    def _values_fit_together(self) -> "Settings":
        if self.compute_dtype == "float16" and not self.force_float16:
            raise ValueError("compute_dtype float16 can overflow to NaN in Qwen3; set force_float16 to use it anyway")
        return self

    @model_validator(mode="after")
    def _presets_exist(self) -> "Settings":
        try:
            field = "presets"
            _ = self._all_presets
            field = "only_presets"
            catalog = self.catalog
            for field in ("default_preset", "predict_preset"):
                if field in self.model_fields_set:  # the default of predict_preset need not be served
                    catalog.get(getattr(self, field))
        except EncoderError as error:
            raise ValueError(f"{field}: {error}") from error
        return self

    @cached_property
    def _all_presets(self) -> Catalog:
        """The built-in presets and those of the preset file. Errors: PresetFileError."""
        return BUILT_IN if self.presets is None else read_presets(self.presets, BUILT_IN)

    @cached_property
    def catalog(self) -> Catalog:
        """The presets that are served. Errors: PresetFileError, InvalidField."""
        catalog = self._all_presets.only(self.only_presets) if self.only_presets else self._all_presets
        return catalog.with_default(self.default_preset or catalog.default)

    @property
    def restricted_to(self) -> tuple[Preset, ...]:
        """The presets that requests are restricted to; empty if requests may ask for any layer."""
        return self.catalog.presets if self.only_presets else ()

    def model_options(self) -> ModelOptions:
        """The model that the encoder loads, and how."""
        return ModelOptions(
            model=self.model,
            revision=self.revision,
            cache_dir=self.cache_dir,
            tokenizer=self.tokenizer,
            rope_theta=self.rope_theta,
            loras=tuple(map(Lora.parse, self.lora)),
            component=self.component,
            quantize=self.quantize,
            compute_dtype=self.compute_dtype,
            force_float16=self.force_float16,
            num_layers=self.num_layers,
            presets=self.restricted_to,
        )

    def limits(self) -> Limits:
        """The limits that the encoder enforces."""
        return Limits(
            max_prompts=self.max_prompts,
            max_prompt_chars=self.max_prompt_chars,
            max_sequence_length=self.max_sequence_length,
            max_output_bytes=self.max_output_bytes,
            max_tokenizing_chars=self.max_tokenizing_chars,
            max_queue_tokens=self.max_queue_tokens,
            max_batch_tokens=self.max_batch_tokens,
        )


class SettingsError(Exception):
    """A setting has a value that is not allowed. The message is one line."""


def load_settings(flags: dict[str, Any]) -> Settings:
    """The settings of this process: flags, then environment, then defaults. An empty value is as if it were not given.

    Errors: SettingsError, naming the flag and the variable.
    """
    try:
        return Settings(**_given(flags))
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(problem) for problem in error.errors(include_url=False))) from error


def _explain(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    shown = "" if name == "api_key" else f" (got {problem['input']!r:.80})"
    return f"{flag(name)} / {variable(name)}: {message}{shown}"


def flag(name: str) -> str:
    """The command line flag of a setting."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + name.upper()


def misspelt_variables() -> Iterator[str]:
    """A line for each variable of the environment whose name is nearly that of a setting."""
    for given in sorted(os.environ):
        name = given.lower().removeprefix(PREFIX.lower())
        if name != given.lower() and name not in Settings.model_fields:
            for near in difflib.get_close_matches(name, Settings.model_fields, 1, cutoff=0.75):
                yield f"{given}: is no setting and is ignored. Did you mean {variable(near)}?"


def choices(field: FieldInfo) -> tuple[str, ...] | None:
    """The values that a setting can be chosen from; None if it is not a choice."""
    values = get_args(field.annotation)
    return values if values and all(isinstance(value, str) for value in values) else None


def is_loopback(host: str) -> bool:
    """Whether a service bound to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settings_table() -> str:
    """The table of docs/settings.md, in Markdown."""
    rows = ["| flag | environment variable | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*rows, *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) else f"`{field.default}`"
        allowed = choices(field)
        meaning = (
            f"{field.description} One of {', '.join(f'`{c}`' for c in allowed)}." if allowed else field.description
        )
        yield f"| `{flag(name)}` | `{variable(name)}` | {default} | {meaning} |"
