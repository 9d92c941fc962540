"""Talks to the service. Needs PyTorch and safetensors, which ComfyUI has, and the standard library."""

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from typing import Any

import safetensors.torch
import torch

DEFAULT_SERVER = os.environ.get("QWEN3_ENCODER_URL") or "http://127.0.0.1:8000"
TIMEOUT_S = 310.0  # of a call with all attempts; somewhat longer than the service itself lets a request wait
INFO_TIMEOUT_S = 5.0
MAX_WAIT_S = 60.0  # for a service that is busy or restarts, all together
FIRST_WAIT_S = 0.5  # where it does not say how long; doubled each time, up to LONGEST_WAIT_S
LONGEST_WAIT_S = 4.0
PASSING = (429, 502, 503)  # busy, a proxy that does not reach the service, one that starts or ends


class EncoderError(RuntimeError):
    """The service refused, failed, or could not be reached. ComfyUI shows the message at the node."""


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and nothing else: no proxy of the environment, no redirect, which would carry prompts and key elsewhere."""
    opener = urllib.request.OpenerDirector()
    for handler in ("HTTPHandler", "HTTPSHandler", "HTTPDefaultErrorHandler", "HTTPErrorProcessor"):
        opener.add_handler(getattr(urllib.request, handler)())
    return opener


OPENER = _opener()


def encode(server: str, body: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Of one prompt the hidden states, the mask of its real rows, and whether it was longer than the window.

    Errors: EncoderError.
    """
    reply = _call(server, "/encode", body, "application/x-safetensors", TIMEOUT_S, MAX_WAIT_S)
    length = int.from_bytes(reply[:8], "little")
    metadata = json.loads(reply[8 : 8 + length])["__metadata__"]
    tensors = safetensors.torch.load(reply)
    return tensors["hidden_states"], tensors["attention_mask"], json.loads(metadata["truncated"])[0]


def served(server: str) -> str:
    """What is served there: equal for as long as equal prompts get equal hidden states.

    Errors: EncoderError.
    """
    info = json.loads(_call(server, "/info", None, "application/json", INFO_TIMEOUT_S, 0.0))
    return f"{info['fingerprint']} {info['compute_dtype']}"


def _call(
    server: str, path: str, body: dict[str, Any] | None, accept: str, timeout_s: float, max_wait_s: float
) -> bytes:
    request = _request(server, path, body, accept)
    ends_at = time.monotonic() + timeout_s
    wait_s = FIRST_WAIT_S
    while True:
        try:
            with OPENER.open(request, timeout=max(0.001, ends_at - time.monotonic())) as response:
                if response.headers.get_content_type() != accept:
                    raise EncoderError(f"{server} answered with something else. Is the service running there?")
                return response.read()
        except urllib.error.HTTPError as error:
            pause_s = _retry_after(error, wait_s)
            if error.code not in PASSING or pause_s > max_wait_s:
                raise EncoderError(_refusal(error, server)) from error
        except (OSError, http.client.HTTPException) as error:  # refused, broken off, or out of time
            pause_s = wait_s
            if pause_s > min(max_wait_s, ends_at - time.monotonic()):
                reason = getattr(error, "reason", error)
                raise EncoderError(f"{server} cannot be reached: {reason}. Is the service running there?") from error
        pause_s *= random.uniform(1, 1.1)  # so that many do not come back at the same moment
        time.sleep(pause_s)
        max_wait_s -= pause_s
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _request(server: str, path: str, body: dict[str, Any] | None, accept: str) -> urllib.request.Request:
    if not server.startswith(("http://", "https://")):
        raise EncoderError(f"server: {server!r} is no address, expected one as {DEFAULT_SERVER}")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.rstrip("/") + path, data, {"accept": accept})
    if data is not None:
        request.add_header("content-type", "application/json")
    # A workflow is a file that others write, and it names a server: none but the one of the environment gets the key.
    if (key := os.environ.get("QWEN3_ENCODER_API_KEY")) and server.rstrip("/") == DEFAULT_SERVER.rstrip("/"):
        request.add_header("authorization", f"Bearer {key}")
    return request


def _retry_after(error: urllib.error.HTTPError, default_s: float) -> float:
    try:
        return max(0.0, float(error.headers["retry-after"]))
    except (TypeError, ValueError):  # not given, or given as a date
        return default_s


def _refusal(error: urllib.error.HTTPError, server: str) -> str:
    """What the service says; where a proxy or another service answered, its status."""
    try:
        detail = json.loads(error.read())["error"]
        return " ".join(filter(None, [detail["message"], detail.get("hint")]))
    except (ValueError, KeyError, TypeError):
        return f"{server} answered {error.code} {error.reason}. Is the service running there?"
