"""What a client sends, how it reads the replies, and when it tries again. Does no input or output itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from app import wire
from app.embeds import Embeds, read_embeds, read_layers
from app.pipelines.plan import Prompts

T = TypeVar("T")
MAX_WAIT_S = 60.0  # between attempts, all together
FIRST_WAIT_S = 0.5  # where the service does not say how long; doubled each time
BUSY = (429, 503)


class ClientError(Exception):
    """The service refused, failed, or could not be reached.

    Args:
        status: of the response; None where none came.
        code: as the service gives it, or "unreachable" or "timeout".
        message: what was found and what was expected.
        hint: the next step, if one is known.
    """

    def __init__(self, status: int | None, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(f"{message} {hint}" if hint else message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint


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
            message = f"{response.url} answered with {media_type or 'no content type'}, expected {self.accept}."
            raise ClientError(response.status_code, "unexpected_reply", message, "Is it this service that runs there?")
        return self.read(response)


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


class Attempts:
    """When to try again, and when to give up. One for each call.

    A busy service is asked again after the time that it names, at most `retries` times and `MAX_WAIT_S` in all. A kept
    connection that the service closed meanwhile is opened anew, once. Errors say `where` it was looked for.
    """

    def __init__(self, retries: int, where: str) -> None:
        self.where = where
        self.left = retries
        self.waits_s = MAX_WAIT_S
        self.next_wait_s = FIRST_WAIT_S
        self.reconnects = 1

    def wait_s(self, response: httpx.Response) -> float:
        """Seconds to wait before the request is sent again.

        Errors: ClientError when it is not to be sent again.
        """
        wait_s = _retry_after(response, self.next_wait_s)
        if response.status_code not in BUSY or self.left == 0 or wait_s > self.waits_s:
            raise _refusal(response)
        self.left -= 1
        self.waits_s -= wait_s
        self.next_wait_s *= 2
        return wait_s

    def reconnect(self, error: httpx.TransportError) -> None:
        """Return when the request is to be sent again, on a new connection.

        Errors: ClientError when it is not.
        """
        closed = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.WriteError)
        if not closed or self.reconnects == 0:
            raise _failure(error, self.where) from error
        self.reconnects -= 1


def _retry_after(response: httpx.Response, default_s: float) -> float:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):  # not given, or given as a date
        return default_s


def _refusal(response: httpx.Response) -> ClientError:
    """The error that a response describes; where a proxy or another service answered, the beginning of what it said."""
    try:
        error = response.json()["error"]
        return ClientError(response.status_code, error["code"], error["message"], error.get("hint"))
    except (ValueError, KeyError, TypeError):
        return ClientError(response.status_code, "http_error", f"{response.status_code}: {response.text[:200]}")


def _failure(error: httpx.TransportError, where: str) -> ClientError:
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return ClientError(None, "timeout", f"{where} did not answer in time.", "Give the client a longer timeout.")
    reason = str(error) or type(error).__name__
    return ClientError(None, "unreachable", f"{where}: {reason}.", "Is the service running there?")
