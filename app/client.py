"""Client of the service, synchronous and asynchronous. Needs httpx, msgpack and NumPy, nothing of the server.

    with Client() as client:
        embeds = client.encode("a cat", preset="flux2-klein")
        prompt_embeds = embeds.torch("cuda")  # bfloat16, (1, 512, 7680)

Both clients are thin: what to send, how to read a reply and when to try again are functions that do no input or output.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx

from app import wire
from app.embeds import Embeds, read_embeds

T = TypeVar("T")
Prompts = str | Sequence[str]
BASE_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 310.0  # somewhat longer than the service itself lets a request wait
CONNECT_TIMEOUT_S = 5.0
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
    """One request, and how its reply is read. All are free of side effects, so that they may be sent twice."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: dict[str, Any] | None = None

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        headers = {"accept": wire.MSGPACK if self.read is _embeds else wire.JSON}
        if self.body is None:
            return {"method": self.method, "url": self.path, "headers": headers}
        headers["content-type"] = wire.JSON
        return {"method": self.method, "url": self.path, "headers": headers, "content": wire.dump_json(self.body)}


def _encode(path: str, prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> Call[Embeds]:
    return Call("POST", path, _embeds, _body(prompt, preset, fields))


def _tokenize(prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> Call[list[dict[str, Any]]]:
    return Call("POST", "/tokenize", lambda response: list(response.json()["prompts"]), _body(prompt, preset, fields))


_PRESETS: Call[dict[str, dict[str, Any]]] = Call(
    "GET", "/presets", lambda response: {preset["name"]: preset for preset in response.json()["presets"]}
)
_INFO: Call[dict[str, Any]] = Call("GET", "/info", lambda response: dict(response.json()))


def _body(prompt: Prompts, preset: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    prompts = {"prompt": prompt} if isinstance(prompt, str) else {"prompts": list(prompt)}
    return prompts | ({} if preset is None else {"preset": preset}) | fields


def _embeds(response: httpx.Response) -> Embeds:
    return read_embeds(wire.unpack(response.content))


class Attempts:
    """When to try again, and when to give up. One for each call.

    A busy service is asked again after the time that it names, at most `retries` times and `MAX_WAIT_S` in all. A kept
    connection that the service closed meanwhile is opened anew, once.
    """

    def __init__(self, retries: int) -> None:
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
            raise _failure(error) from error
        self.reconnects -= 1


def _retry_after(response: httpx.Response, default_s: float) -> float:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):  # not given, or given as a date
        return default_s


def _refusal(response: httpx.Response) -> ClientError:
    """The error that a response describes; where something else than the service answered, what it said."""
    try:
        error = response.json()["error"]
        return ClientError(response.status_code, error["code"], error["message"], error.get("hint"))
    except (ValueError, KeyError, TypeError):
        return ClientError(response.status_code, "http_error", f"{response.status_code}: {response.text[:200]}")


def _failure(error: httpx.TransportError) -> ClientError:
    where = error.request.url
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return ClientError(None, "timeout", f"{where} did not answer in time.", "Give the client a longer timeout.")
    reason = str(error) or type(error).__name__
    return ClientError(None, "unreachable", f"{where}: {reason}.", "Is the service running there?")


def _options(base_url: str, api_key: str | None, timeout: float) -> dict[str, Any]:
    """The arguments that httpx's two clients share. The environment's proxy is not for a service close by."""
    return {
        "base_url": base_url,
        "headers": {} if api_key is None else {"authorization": f"Bearer {api_key}"},
        "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S)),
        "trust_env": False,
    }


class Client:
    """A connection to the service, to be used from one thread at a time or from several.

    Args:
        base_url: where the service listens.
        uds: path of its Unix socket, if it listens on one.
        api_key: if it asks for one.
        timeout: longest wait for a reply, in seconds.
        retries: of a request that the service was too busy to take.
    """

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        uds: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retries: int = 5,
    ) -> None:
        self._http = httpx.Client(transport=httpx.HTTPTransport(uds=uds), **_options(base_url, api_key, timeout))
        self._retries = retries

    def encode(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """The hidden states of a preset, or the last hidden state without one; `fields` as in POST /encode."""
        return self._call(_encode("/encode", prompt, preset, fields))

    def encode_layers(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """The hidden states of chosen `layers` or `hidden_states`; `fields` as in POST /encode_layers."""
        return self._call(_encode("/encode_layers", prompt, preset, fields))

    def tokenize(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """For each prompt its text, input_ids, tokens, num_tokens and truncated."""
        return self._call(_tokenize(prompt, preset, fields))

    def presets(self) -> dict[str, dict[str, Any]]:
        """All presets by name."""
        return self._call(_PRESETS)

    def info(self) -> dict[str, Any]:
        """What is served, how it computes, and the limits of a request."""
        return self._call(_INFO)

    def _call(self, call: Call[T]) -> T:
        attempts = Attempts(self._retries)
        while True:
            try:
                response = self._http.request(**call.request)
            except httpx.TransportError as error:
                attempts.reconnect(error)
                continue
            if response.is_success:
                return call.read(response)
            time.sleep(attempts.wait_s(response))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The same as `Client`, with the same arguments, for `async` code."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        uds: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retries: int = 5,
    ) -> None:
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=uds), **_options(base_url, api_key, timeout)
        )
        self._retries = retries

    async def encode(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """As `Client.encode`."""
        return await self._call(_encode("/encode", prompt, preset, fields))

    async def encode_layers(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """As `Client.encode_layers`."""
        return await self._call(_encode("/encode_layers", prompt, preset, fields))

    async def tokenize(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """As `Client.tokenize`."""
        return await self._call(_tokenize(prompt, preset, fields))

    async def presets(self) -> dict[str, dict[str, Any]]:
        """As `Client.presets`."""
        return await self._call(_PRESETS)

    async def info(self) -> dict[str, Any]:
        """As `Client.info`."""
        return await self._call(_INFO)

    async def _call(self, call: Call[T]) -> T:
        attempts = Attempts(self._retries)
        while True:
            try:
                response = await self._http.request(**call.request)
            except httpx.TransportError as error:
                attempts.reconnect(error)
                continue
            if response.is_success:
                return call.read(response)
            await asyncio.sleep(attempts.wait_s(response))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
