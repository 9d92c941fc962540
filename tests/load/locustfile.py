"""Load as diffusion frontends make it: short tags to long descriptions, all routes and formats, every body checked.

    locust -f tests/load/locustfile.py --headless -u 64 -r 16 -t 60s --host http://127.0.0.1:8000

429 is the service's right under load and no failure. Anything else that is not a whole and correct 200 fails the run:
the process exits with 1, also when nothing was served at all.
"""

import base64
import json
import os
import random
import struct
from typing import Any

import msgpack
from locust import HttpUser, between, events, task

TAGS = ("cat", "portrait", "red sofa", "soft light", "35mm film", "bokeh", "street", "rain", "neon", "night", "forest",
        "oil on canvas", "isometric", "low poly", "macro", "golden hour", "snow", "desert", "harbour")  # fmt: skip
SUBJECTS = (
    "an old fisherman",
    "a ginger cat",
    "two children",
    "a glass observatory",
    "a paper boat",
    "a street musician",
)
PLACES = (
    "in a flooded library",
    "on a red sofa",
    "under a copper sky",
    "beside a quiet canal",
    "at the edge of a wood",
)
DETAILS = (
    "The light comes from the left, low and warm, and leaves the far wall in shadow.",
    "Every surface shows its age: chipped paint, worn brass, a hairline crack in the window.",
    "In the background a train crosses the bridge, slightly out of focus.",
    "The palette is muted, ochre and slate, with one accent of vermilion.",
    "Shot at eye level with a 50 mm lens, shallow depth of field, fine grain.",
    "Rain has just stopped, and the stones reflect the lamps in long broken lines.",
)
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "bool": 1}
SAFETENSORS_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "BOOL": 1}


def prompt() -> str:
    """A few tags, a sentence, or a description of up to 300 words; a third of all prompts have been seen before."""
    seeded = random.Random(random.randrange(200)) if random.random() < 1 / 3 else random.Random()
    kind = seeded.random()
    if kind < 0.4:
        return ", ".join(seeded.sample(TAGS, seeded.randint(2, 8)))
    sentence = (
        f"{seeded.choice(SUBJECTS)} {seeded.choice(PLACES)}, {seeded.choice(TAGS)}, number {seeded.randrange(10**6)}."
    )
    if kind < 0.75:
        return sentence
    words = [sentence, *(seeded.choice(DETAILS) for _ in range(seeded.randint(2, 20)))]
    return " ".join(" ".join(words).split()[:300])


def prompts() -> list[str]:
    """One prompt, a prompt with the usual empty negative, or a small batch."""
    return random.choice([[prompt()], [prompt(), ""], [prompt() for _ in range(random.randint(2, 4))]])


class Mismatch(Exception):
    """A body is not what was asked for."""


def check(condition: bool, message: str) -> None:
    """Raise Mismatch unless the condition holds."""
    if not condition:
        raise Mismatch(message)


def check_tensor(tensor: dict[str, Any], dtype: str, shape: list[int | None]) -> None:
    """Compare dtype, shape and byte length with what was asked for; None stands for any length."""
    check(tensor["dtype"] == dtype, f"dtype {tensor['dtype']}, expected {dtype}")
    found = tensor["shape"]
    check(len(found) == len(shape), f"shape {found}, expected {shape}")
    check(all(e in (None, f) and f > 0 for f, e in zip(found, shape, strict=True)), f"shape {found}, expected {shape}")
    size = ITEM_BYTES[dtype]
    for length in found:
        size *= length
    check(len(tensor["data"]) == size, f"{len(tensor['data'])} bytes of {dtype} {found}, expected {size}")


def check_document(document: dict[str, Any], count: int, dtype: str, shape: list[int | None]) -> None:
    """Compare a msgpack or JSON reply with what was asked for."""
    check_tensor(document["hidden_states"], dtype, shape)
    rows = document["hidden_states"]["shape"][-2]
    check_tensor(document["attention_mask"], "bool", [count, rows])
    check(len(document["num_tokens"]) == len(document["truncated"]) == count, "num_tokens or truncated incomplete")
    check(document["usage"]["prompt_tokens"] == sum(document["num_tokens"]), "usage does not add up")
    real = sum(bytes(document["attention_mask"]["data"]))
    check(real == sum(document["num_tokens"]), f"mask has {real} rows, expected {document['num_tokens']}")


def decode_json(body: bytes) -> dict[str, Any]:
    """A JSON reply, its base64 decoded."""
    document: dict[str, Any] = json.loads(body)
    for name in ("hidden_states", "attention_mask"):
        document[name]["data"] = base64.b64decode(document[name]["data"], validate=True)
    return document


def check_safetensors(body: bytes, shape: list[int | None]) -> None:
    """Compare a safetensors reply with what was asked for, down to the last byte."""
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    check("__metadata__" in header, "no metadata")
    end = 0
    for name in ("hidden_states", "attention_mask"):
        entry = header[name]
        start, stop = entry["data_offsets"]
        size = SAFETENSORS_ITEM_BYTES[entry["dtype"]]
        for dim in entry["shape"]:
            size *= dim
        check(stop - start == size, f"{name}: {stop - start} bytes, expected {size}")
        end = max(end, stop)
    found = header["hidden_states"]["shape"]
    check(all(e in (None, f) for f, e in zip(found, shape, strict=True)), f"shape {found}, expected {shape}")
    check(len(body) == 8 + length + end, f"{len(body)} bytes, expected {8 + length + end}")


class Frontend(HttpUser):
    """A diffusion frontend: encodes, waits as long as it takes to draw a picture's first step, encodes again."""

    wait_time = between(0.01, 0.2)

    def on_start(self) -> None:
        """Learn the checkpoint's dims, which the checks need."""
        key = os.environ.get("QWEN3_ENCODER_API_KEY")
        if key:
            self.client.headers["authorization"] = f"Bearer {key}"
        self.hidden_size: int = self.client.get("/info").json()["dims"]["hidden_size"]

    def post(self, path: str, body: dict[str, Any], accept: str, check_body: Any, *, as_msgpack: bool = False) -> None:
        """Send a request and check the whole answer."""
        content, content_type = (
            (msgpack.packb(body), "application/msgpack") if as_msgpack else (json.dumps(body), "application/json")
        )
        headers = {"accept": accept, "content-type": content_type}
        name = f"{path} {body.get('preset', '')} {accept.rpartition('/')[2]}"
        with self.client.post(path, data=content, headers=headers, name=name, catch_response=True) as response:
            if response.status_code == 429:
                response.success() if "retry-after" in response.headers else response.failure("429 without Retry-After")
                return
            if response.status_code != 200:
                response.failure(f"{response.status_code}: {response.text[:200]}")
                return
            try:
                check(int(response.headers["content-length"]) == len(response.content), "body is not whole")
                check("x-request-id" in response.headers and "x-inference-time" in response.headers, "headers missing")
                check_body(response)
            except (Mismatch, ValueError, KeyError, TypeError, struct.error) as error:
                response.failure(f"{type(error).__name__}: {error}")
            else:
                response.success()

    @task(6)
    def z_image(self) -> None:
        """Rows of real tokens, as msgpack both ways."""
        texts = prompts()
        body = {"prompts": texts, "preset": "z-image", "dtype": random.choice(["bfloat16", "float32"])}
        shape = [len(texts), None, self.hidden_size]
        self.post(
            "/encode",
            body,
            "application/msgpack",
            lambda r: check_document(msgpack.unpackb(r.content), len(texts), body["dtype"], shape),
            as_msgpack=True,
        )

    @task(3)
    def last_hidden_state(self) -> None:
        """No preset, as JSON."""
        text = prompt()
        self.post(
            "/encode",
            {"prompt": text},
            "application/json",
            lambda r: check_document(decode_json(r.content), 1, "bfloat16", [1, None, self.hidden_size]),
        )

    @task(1)
    def flux2_klein(self) -> None:
        """The whole window of 512 rows, padding included, as safetensors."""
        texts = prompts()[:2]
        shape = [len(texts), 512, 3 * self.hidden_size]
        body = {"prompts": texts, "preset": "flux2-klein"}
        self.post("/encode", body, "application/x-safetensors", lambda r: check_safetensors(r.content, shape))

    @task(3)
    def layers(self) -> None:
        """Chosen layers, concatenated or stacked."""
        texts, combine = prompts(), random.choice(["concat", "stack"])
        body = {"prompts": texts, "layers": [8, 17, 26], "combine": combine, "dtype": "float16"}
        concat, stack = [len(texts), None, 3 * self.hidden_size], [len(texts), 3, None, self.hidden_size]
        shape = concat if combine == "concat" else stack
        self.post(
            "/encode_layers",
            body,
            "application/x-msgpack",
            lambda r: check_document(msgpack.unpackb(r.content), len(texts), "float16", shape),
        )

    @task(2)
    def bare_tensor(self) -> None:
        """One tensor without a container, as diffusers' remote components read it."""

        def check_body(response: Any) -> None:
            rows = json.loads(response.headers["shape"])[1]
            tensor = {"dtype": response.headers["dtype"], "shape": json.loads(response.headers["shape"])}
            check_tensor(tensor | {"data": response.content}, "bfloat16", [1, rows, self.hidden_size])

        self.post("/encode_layers", {"prompt": prompt(), "hidden_states": [-2]}, "tensor/binary", check_body)


@events.quitting.add_listener
def set_exit_code(environment: Any, **_: Any) -> None:
    """1 for any failure, and when nothing was asked at all."""
    total = environment.stats.total
    environment.process_exit_code = 1 if total.num_failures or not total.num_requests else 0
