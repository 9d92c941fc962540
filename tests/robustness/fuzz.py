"""Requests that no client should send: wrong fields, wrong headers, wrong targets, wrong bytes. Equal seeds give equal
requests."""

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from tests.robustness.clients import HOST

ROUTES = (
    "/encode",
    "/encode_layers",
    "/tokenize",
    "/predict",
    "/te",
    "/sglang/encode",
    "/v1/hidden_states",
    "/v1/hidden_states/structured",
)
PATHS = (*ROUTES, "/livez", "/readyz", "/health", "/presets", "/info", "/metrics", "/docs", "/openapi.json", "/none")
METHODS = ("POST", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "post", "X" * 20)
FIELDS: dict[str, Any] = {
    "prompt": "a cat",
    "prompts": ["a cat", "a dog"],
    "preset": "z-image",
    "max_sequence_length": 64,
    "padding": "longest",
    "prefix": "",
    "suffix": "x",
    "dtype": "float32",
    "layers": [-2],
    "hidden_states": [3],
    "combine": "stack",
    "input": "a cat",
    "layer": -2,
    "max_length": 77,
    "encoding_format": "base64",
    "return_attention_mask": True,
    "user_prompt": "a cat",
    "system_prompt": "be literal",
    "return_token_boundaries": True,
    "negative_prompt": "",
    "image_path": None,
    "timeout_ms": 5000,
}
VALID: tuple[Any, ...] = (
    {"prompt": "a cat"},
    {"prompt": "a cat", "preset": "z-image", "max_sequence_length": 64, "dtype": "float16"},
    {"prompts": ["a cat", ""], "layers": [-1, 3], "combine": "stack"},
    ["a cat"],
    {"input": "a cat", "encoding_format": "base64"},
    {"user_prompt": "a cat", "return_token_boundaries": True, "encoding_format": "base64"},
)
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 77.0, 1e308, -0.0, 2**31, 2**63, 2**64 - 1, -(2**63), 10**30),
    *("", " ", "\0", "a\nb", "é", "日本語", "\ud800", "\u202e", "%s%n", "<|im_start|>", "<|endoftext|>", "x" * 3000),
    *([], [[]], [None], [""], ["a"] * 65, [0] * 300, [-1, -1], [1.5], ["a", 1], {}, {"a": {"b": {}}}, {"": None}),
    *("z-image", "flux2-klein", "NaN", "bfloat16", "none", "../../etc/passwd"),
)
HEADERS = (
    "accept",
    "accept-encoding",
    "authorization",
    "cache-control",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "origin",
    "range",
    "te",
    "traceparent",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-request-id",
    "x-forwarded-for",
)
VALUES = (
    *("*/*", "application/json", "application/msgpack", "tensor/binary;q=0", "a/b;q=2", "text/html, */*;q=0.1", ",,,;"),
    *("gzip", "deflate", "br", "identity", "chunked", "gzip, chunked", "no-store", "no-cache", "close", "keep-alive"),
    *(
        "h2c",
        "websocket",
        "100-continue",
        "0",
        "-1",
        "99999999999999999999",
        "1e3",
        "+5",
        "",
        " ",
        "\t",
        "é",
        "x" * 900,
    ),
    *(
        "application/json; charset=utf-16",
        "application/json;charset=nonsense",
        "application/json; charset=",
        "a" * 70000,
    ),
    *("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "00-0-0-0", "evil.example", "[::1]:1", "[::1]evil"),
)


class Fuzz:
    """An endless source of requests, each the bytes of one connection.

    Args:
        seed: of all its choices.
    """

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._wrong_fields,
            self._wrong_fields,
            self._wrong_json,
            self._wrong_msgpack,
            self._wrong_headers,
            self._wrong_target,
            self._packed,
            self._chunked,
            self._mutated,
            self._noise,
        )

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self.dice.choice(self._kinds)()

    def _request(self, body: bytes, media_type: str = "application/json", *more: str, path: str = "") -> bytes:
        lines = [
            f"POST {path or self.dice.choice(ROUTES)} HTTP/1.1",
            f"host: {HOST}",
            "connection: close",
            f"content-type: {media_type}",
            f"content-length: {len(body)}",
            *more,
        ]
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body

    def _value(self, depth: int = 0) -> Any:
        dice = self.dice
        match dice.randrange(8):
            case 0 if depth < 5:
                return [self._value(depth + 1) for _ in range(dice.randrange(5))]
            case 1 if depth < 5:
                return {dice.choice(list(FIELDS)): self._value(depth + 1) for _ in range(dice.randrange(5))}
            case 2:
                return dice.choice(list(FIELDS.values()))
            case _:
                return dice.choice(NASTY)

    def _document(self) -> Any:
        dice = self.dice
        if dice.random() < 0.1:
            return self._value()
        if dice.random() < 0.3:
            return dice.choice(VALID)
        names = dice.sample(list(FIELDS), dice.randrange(1, 6))
        fields = {name: FIELDS[name] for name in names}
        for name in dice.sample(names, dice.randrange(len(names) + 1)):
            fields[name] = self._value()
        if dice.random() < 0.2:
            fields[str(dice.choice(NASTY))] = self._value()
        return fields

    def _wrong_fields(self) -> bytes:
        return self._request(json.dumps(self._document()).encode())

    def _wrong_json(self) -> bytes:
        dice = self.dice
        text = json.dumps(self._document(), ensure_ascii=dice.random() < 0.5)
        match dice.randrange(8):
            case 0:
                text = text[: dice.randrange(len(text) + 1)]
            case 1:
                text = "[" * dice.choice((10, 900, 5000)) + text
            case 2:
                text = text.replace("{", '{"prompt": "b", "prompt": "a", ', 1)
            case 3:
                text = text.replace(":", ": NaN, ", 1)
            case 4:
                text = "\ufeff" + text
            case 5:
                text = f'{{"prompt": "a", "layer": {"9" * dice.choice((30, 5000))}}}'
            case 6:
                text = text + text
            case 7:
                body = bytearray(text.encode("utf-8", "surrogatepass"))
                for _ in range(3):
                    body[dice.randrange(len(body))] = dice.randrange(256)
                return self._request(bytes(body))
        encoding = dice.choice(("utf-8", "utf-8", "utf-16", "latin-1", "utf-32"))
        return self._request(text.encode(encoding, "replace"))

    def _wrong_msgpack(self) -> bytes:
        dice = self.dice
        try:
            body = bytearray(msgpack.packb(self._document(), unicode_errors="surrogatepass"))
        except (OverflowError, ValueError):
            body = bytearray(msgpack.packb({1: b"\xff", "prompt": msgpack.Timestamp(1)}))
        match dice.randrange(5):
            case 0:
                del body[dice.randrange(len(body)) :]
            case 1:
                body[dice.randrange(len(body))] = dice.choice((0xC1, 0xC7, 0xC9, 0xDD, 0xDF, 0xDB, 0xC6, 0xD4, 0xFF))
            case 2:
                body = bytearray(dice.randbytes(dice.randrange(40)))
            case 3:
                body = bytearray(b"\x91" * dice.choice((5, 600, 3000)) + body)
        return self._request(bytes(body), dice.choice(("application/msgpack", "application/x-msgpack")))

    def _wrong_headers(self) -> bytes:
        dice = self.dice
        lines = [f"{dice.choice(HEADERS)}: {dice.choice(VALUES)}" for _ in range(dice.randrange(1, 6))]
        if dice.random() < 0.2:
            lines.append(dice.choice((": no name", "no colon", " folded", "name : x", "n\0: x", "x: \0", "é: é")))
        body = json.dumps(self._document()).encode()
        start = [f"{dice.choice(METHODS)} {dice.choice(PATHS)} HTTP/1.{dice.choice('01')}", "connection: close"]
        usual = [f"host: {HOST}", "content-type: application/json", f"content-length: {len(body)}"]
        lines = [*start, *[line for line in usual if dice.random() < 0.8], *lines, "", ""]
        return "\r\n".join(lines).encode() + body

    def _wrong_target(self) -> bytes:
        dice = self.dice
        parts = [
            *PATHS,
            *("?", "?preset=", "?dtype=float32", "?encoding=float", "&", "=", "%", "%00", "%ff", "/..", "//", "/", "#"),
            *("é", "\\", ";", "a" * 200, "http://evil.example/", "*", "?preset=z-image&preset=a", "%2e%2e"),
        ]
        target = "".join(dice.choices(parts, k=dice.randrange(1, 5)))
        body = json.dumps(self._document()).encode()
        head = f"{dice.choice(METHODS[:6])} {target} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
        fields = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        return (head + fields).encode("utf-8", "surrogatepass") + body

    def _packed(self) -> bytes:
        dice, body = self.dice, json.dumps(self._document()).encode()
        coding = dice.choice(("gzip", "deflate", "x-gzip", "br", "gzip, gzip", "identity"))
        packed = bytearray(gzip.compress(body, 1) if "gzip" in coding else zlib.compress(body))
        if dice.random() < 0.5:
            packed[dice.randrange(len(packed))] ^= 0xFF
        return self._request(bytes(packed), "application/json", f"content-encoding: {coding}")

    def _chunked(self) -> bytes:
        dice, body = self.dice, json.dumps(self._document()).encode()
        chunks = b""
        while body:
            size = dice.randrange(1, 60)
            chunk, body = body[:size], body[size:]
            length = len(chunk) if dice.random() < 0.98 else dice.choice((0, 10**6, len(chunk) - 1))
            chunks += b"%x%b\r\n%b\r\n" % (length, dice.choice((b"", b"", b";a=b")), chunk)
        chunks += dice.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"", b"0\r\n"))
        head = f"POST {dice.choice(ROUTES)} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
        return (head + "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n").encode() + chunks

    def _mutated(self) -> bytes:
        dice, data = self.dice, bytearray(self._request(json.dumps(self._document()).encode()))
        for _ in range(dice.randrange(1, 5)):
            at = dice.randrange(len(data))
            match dice.randrange(4):
                case 0:
                    data[at] = dice.randrange(256)
                case 1:
                    del data[at : at + dice.randrange(1, 9)]
                case 2:
                    data[at:at] = dice.randbytes(dice.randrange(1, 9))
                case 3:
                    data[at:at] = data[at : at + 40]
            if not data:
                break
        return bytes(data)

    def _noise(self) -> bytes:
        dice = self.dice
        return dice.choice(
            (b"", b"POST ", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        ) + (dice.randbytes(dice.randrange(1, 200)) + b"\r\n\r\n")
