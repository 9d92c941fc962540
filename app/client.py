"""Client of the service, synchronous and asynchronous. Needs httpx, msgpack and NumPy, nothing of the server.

with Client() as client:
    embeds = client.encode("a cat", preset="flux2-klein")
    prompt_embeds = embeds.torch("cuda")  # bfloat16, (1, 512, 7680)
    image = pipe(**client.for_pipeline(pipe, "a cat", num_inference_steps=4)).images[0]
"""

import asyncio
import os
import time
from types import TracebackType
from typing import Any, Self

import httpx

from app.attempts import Attempts
from app.attempts import ClientError as ClientError
from app.embeds import Embeds
from app.exchange import (
    Call,
    T,
    encode_call,
    encode_layers_call,
    info_call,
    presets_call,
    tokenize_call,
    without_password,
)
from app.pipelines import Plan, override
from app.pipelines.plan import Prompts

BASE_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 310.0  # somewhat longer than the service itself lets a request wait


def _options(base_url: str, api_key: str | None) -> dict[str, Any]:
    """The arguments that httpx's two clients share. The environment's proxy is not for a service close by."""
    return {
        "base_url": base_url,
        "headers": {b"authorization": f"Bearer {api_key}".encode()} if api_key else {},
        "trust_env": False,
    }


def _path(uds: str | os.PathLike[str] | None) -> str | None:
    return None if uds is None else os.fspath(uds)


class Client:
    """A connection to the service, to be used from one thread at a time or from several.

    Args:
        base_url: where the service listens.
        uds: path of its Unix socket, if it listens on one.
        api_key: if it asks for one; an empty one, as of an empty variable, is none.
        timeout: longest time of a call in seconds, with all attempts: while the service is busy or restarts, the client
            tries again.
        retries: at most so many; None tries for as long as there is time.
    """

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        uds: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retries: int | None = None,
    ) -> None:
        self._http = httpx.Client(transport=httpx.HTTPTransport(uds=_path(uds)), **_options(base_url, api_key))
        self._timeout, self._retries = timeout, retries
        self._where = without_password(base_url) if uds is None else os.fspath(uds)

    def encode(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """The hidden states of a preset, or the last hidden state without one; `fields` as in POST /encode."""
        return self._call(encode_call(prompt, preset, fields))

    def encode_layers(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """The hidden states of chosen `layers` or `hidden_states`; `fields` as in POST /encode_layers."""
        return self._call(encode_layers_call(prompt, preset, fields))

    def tokenize(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """For each prompt its text, input_ids, tokens, num_tokens and truncated."""
        return self._call(tokenize_call(prompt, preset, fields))

    def presets(self) -> dict[str, dict[str, Any]]:
        """All presets by name."""
        return self._call(presets_call())

    def info(self) -> dict[str, Any]:
        """What is served, how it computes, and the limits of a request."""
        return self._call(info_call())

    def for_pipeline(
        self,
        pipe: Any,
        prompt: Prompts,
        negative_prompt: Prompts | None = None,
        *,
        preset: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """What a pipeline of diffusers takes instead of prompts.

            pipe(**client.for_pipeline(pipe, "a cat", height=512, width=512))

        Embeds and masks as its class wants them, on its device and in its transformer's dtype; negatives where the call
        is guided. `more` are the other arguments of the call, handed on. `preset` takes the place of the usual one.
        Errors: TypeError for a class that is not known; ValueError for images that its text encoder would look at.
        """
        plan = Plan(pipe, self.presets(), prompt, negative_prompt, preset, more)
        return plan.arguments([self.encode(**request) for request in plan.requests])

    def patch(self, pipe: Any, preset: str | None = None) -> None:
        """Make a pipeline of diffusers that takes no embeds ask this client; then call it with prompts, as always.

        Errors: TypeError for a class that is not known.
        """
        override(pipe, self.encode, preset)

    def _call(self, call: Call[T]) -> T:
        attempts = Attempts(self._timeout, self._retries, self._where)
        while True:
            try:
                response = self._send(call, attempts)
            except httpx.RequestError as error:
                time.sleep(attempts.wait_after_error(error))
                continue
            if response.is_success:
                return call.reply(response)
            time.sleep(attempts.wait_after_reply(response))

    def _send(self, call: Call[T], attempts: Attempts) -> httpx.Response:
        """One attempt. httpx limits each read; a reply may consist of any number of them."""
        parts = []
        with self._http.stream(**call.request, timeout=attempts.timeout()) as response:
            for part in response.iter_raw():
                parts.append(part)
                if attempts.left_s < 0:
                    raise attempts.overdue()
        return httpx.Response(
            response.status_code, headers=response.headers, content=b"".join(parts), request=response.request
        )

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
    """The same as `Client`, with the same arguments, for `async` code; all but `patch`, since pipelines do not wait."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        *,
        uds: str | os.PathLike[str] | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        retries: int | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=_path(uds)), **_options(base_url, api_key)
        )
        self._timeout, self._retries = timeout, retries
        self._where = without_password(base_url) if uds is None else os.fspath(uds)

    async def encode(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """As `Client.encode`."""
        return await self._call(encode_call(prompt, preset, fields))

    async def encode_layers(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> Embeds:
        """As `Client.encode_layers`."""
        return await self._call(encode_layers_call(prompt, preset, fields))

    async def tokenize(self, prompt: Prompts, preset: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """As `Client.tokenize`."""
        return await self._call(tokenize_call(prompt, preset, fields))

    async def presets(self) -> dict[str, dict[str, Any]]:
        """As `Client.presets`."""
        return await self._call(presets_call())

    async def info(self) -> dict[str, Any]:
        """As `Client.info`."""
        return await self._call(info_call())

    async def for_pipeline(
        self,
        pipe: Any,
        prompt: Prompts,
        negative_prompt: Prompts | None = None,
        *,
        preset: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """As `Client.for_pipeline`."""
        plan = Plan(pipe, await self.presets(), prompt, negative_prompt, preset, more)
        return plan.arguments([await self.encode(**request) for request in plan.requests])

    async def _call(self, call: Call[T]) -> T:
        attempts = Attempts(self._timeout, self._retries, self._where)
        while True:
            try:
                async with asyncio.timeout(attempts.left_s):
                    response = await self._http.request(**call.request, timeout=attempts.timeout())
            except TimeoutError as error:
                raise attempts.overdue() from error
            except httpx.RequestError as error:
                await asyncio.sleep(attempts.wait_after_error(error))
                continue
            if response.is_success:
                return call.reply(response)
            await asyncio.sleep(attempts.wait_after_reply(response))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
