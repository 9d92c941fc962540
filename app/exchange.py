"""What a client sends, and how it reads the replies. Does no input or output itself."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from app import wire
from app.attempts import ClientError
from app.embeds import Embeds, read_embeds, read_layers
from app.pipelines.plan import Prompts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its reply is read. No request changes anything, so each may be sent twice."""

    method: str
    path: str
    accept: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        bare = {"method": self.method, "url": self.path, "headers": {"accept": self.accept}}
        if self.body is None:
            return bare
        headers = {"accept": self.accept, "content-type": wire.JSON}
        return bare | {"headers": headers, "content": wire.dump_json(self.body)}

    def reply(self, response: httpx.Response) -> T:
        """What a successful response says.

        Errors: ClientError when it is not of the type that was asked for, because something else listens there.
        """
        media_type = response.headers.get("content-type", "").partition(";")[0]
        if media_type != self.accept:
            message = f"{_address(response)} answered with {media_type or 'no content type'}, expected {self.accept}."
            raise ClientError(response.status_code, "unexpected_reply", message, "Is it this service that runs there?")
        try:
            return self.read(response)
        except (ValueError, KeyError, TypeError) as error:
            message = f"{_address(response)} answered with something that cannot be read: {error!r}."
            raise ClientError(response.status_code, "unexpected_reply", message, "Is it this service there?") from error


def encode_call(prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> Call[Embeds]:
    """POST /encode."""
    return Call("POST", "/encode", wire.SAFETENSORS, _embeds, _body(prompt, preset, fields))


def encode_layers_call(prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> Call[Embeds]:
    """POST /encode_layers."""
    return Call("POST", "/encode_layers", wire.SAFETENSORS, _layers, _body(prompt, preset, fields))


def tokenize_call(prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> Call[list[dict[str, Any]]]:
    """POST /tokenize."""
    return Call("POST", "/tokenize", wire.JSON, _tokenized, _body(prompt, preset, fields))


def presets_call() -> Call[dict[str, dict[str, Any]]]:
    """GET /presets, by name."""
    return Call("GET", "/presets", wire.JSON, _presets)


def info_call() -> Call[dict[str, Any]]:
    """GET /info."""
    return Call("GET", "/info", wire.JSON, lambda response: dict(response.json()))


def _body(prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    prompts = {"prompt": prompt} if isinstance(prompt, str) else {"prompts": list(prompt)}
    return prompts | ({} if preset is None else {"preset": preset}) | fields


def _embeds(response: httpx.Response) -> Embeds:
    return read_embeds(_document(response))


def _layers(response: httpx.Response) -> Embeds:
    return read_layers(_document(response))


def _document(response: httpx.Response) -> dict[str, Any]:
    """The reply, its tensors in the memory that they came in; msgpack would copy them out."""
    document = wire.unpack_safetensors(response.content)
    return document | {name: json.loads(document[name]) for name in ("num_tokens", "truncated")}


def _tokenized(response: httpx.Response) -> list[dict[str, Any]]:
    return list(response.json()["prompts"])


def _presets(response: httpx.Response) -> dict[str, dict[str, Any]]:
    return {preset["name"]: preset for preset in response.json()["presets"]}


def without_password(address: str) -> str:
    """An address as it may be shown."""
    return re.sub(r"//[^/]*@", "//", address)


def _address(response: httpx.Response) -> str:
    return without_password(str(response.url))
