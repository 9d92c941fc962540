"""The client for JavaScript in Node, and the page behind its little web server, against a real service."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.client import Client
from tests.conftest import RunningServer, Start

SOURCE = Path(__file__).parents[2] / "examples" / "javascript"
PROMPT = "a red fox 🦊 in deep snow"
NODE = shutil.which("node")
NPM = shutil.which("npm")

pytestmark = pytest.mark.skipif(NODE is None or NPM is None, reason="needs node and npm")


def npm_install(folder: Path, *packages: str) -> None:
    process = subprocess.run(
        [str(NPM), "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        pytest.skip(f"npm cannot install: {process.stderr.strip()[-200:]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its dependency, as a user has it after `npm install`."""
    folder = tmp_path_factory.mktemp("javascript") / "example"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("node_modules"))
    npm_install(folder)
    return folder


def run_node(folder: Path, url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(NODE), *arguments],
        cwd=folder,
        env=os.environ | {"QWEN3_ENCODER_URL": url} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def evaluate(folder: Path, url: str, code: str) -> Any:
    """What a module prints as JSON that has imported everything of the client."""
    script = f'import * as qwen3 from "./qwen3-encoder.js"; const url = {json.dumps(url)};\n{code}'
    process = run_node(folder, url, "--input-type=module", "--eval", script)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_node_reads_the_numbers_that_python_reads(folder: Path, server: RunningServer, dtype: str) -> None:
    """To the last bit: every dtype of the wire fits into a Float32Array."""
    floats = evaluate(
        folder,
        server.url,
        f"""
        const body = {{ prompt: {json.dumps(PROMPT)}, preset: "flux2-klein", dtype: "{dtype}" }};
        const {{ hiddenStates, attentionMask, numTokens }} = await qwen3.encode(url, body);
        const base64 = (data) => Buffer.from(data.buffer).toString("base64");
        const numbers = [hiddenStates.shape, base64(hiddenStates.data), base64(attentionMask.data), numTokens];
        console.log(JSON.stringify(numbers));
        """,
    )
    with Client(server.url) as client:
        theirs = client.encode(PROMPT, preset="flux2-klein", dtype=dtype)

    shape, numbers, mask, num_tokens = floats
    assert tuple(shape) == theirs.numpy().shape == (1, 512, 96)
    assert decoded(numbers) == theirs.numpy().tobytes()
    assert decoded(mask) == theirs.attention_mask.array.tobytes()
    assert num_tokens == list(theirs.num_tokens)


def decoded(base64: str) -> bytes:
    import base64 as codec

    return codec.b64decode(base64)


def test_float16_is_decoded_by_hand(folder: Path, server: RunningServer) -> None:
    """Node 20 has no Float16Array. All 65,536 of them, with zeros, subnormal numbers and infinities."""
    everything = evaluate(
        folder,
        server.url,
        """
        const bytes = new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);
        const { data } = qwen3.toTensor({ dtype: "float16", shape: [65536], data: bytes });
        console.log(JSON.stringify(Buffer.from(data.buffer).toString("base64")));
        """,
    )
    ours = np.frombuffer(decoded(everything), np.float32)
    theirs = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)

    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[[0, 0x8000]]), [False, True])


def test_the_rows_of_each_prompt_are_found(folder: Path, server: RunningServer) -> None:
    """Shorter prompts of a request are padded."""
    shape, data = evaluate(
        folder,
        server.url,
        """
        const embeds = await qwen3.encode(url, { prompts: ["a cat", "a much longer prompt"], preset: "z-image" });
        const { shape, data } = qwen3.rows(embeds, 0);
        console.log(JSON.stringify([shape, [...data]]));
        """,
    )
    with Client(server.url) as client:
        theirs = client.encode(["a cat", "a much longer prompt"], preset="z-image").rows(0).numpy()

    assert tuple(shape) == theirs.shape
    np.testing.assert_array_equal(np.float32(data).reshape(shape), theirs)


def test_the_command_prints_what_the_readme_says(folder: Path, server: RunningServer) -> None:
    process = run_node(folder, server.url, "encode.js", "a cat", "z-image")
    [documented] = re.findall(r'^\{"model".*$', (SOURCE / "README.md").read_text(), flags=re.MULTILINE)

    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == documented


def test_errors_are_the_services(folder: Path, server: RunningServer) -> None:
    process = run_node(folder, server.url, "encode.js", "a cat", "no-such-preset")

    assert process.returncode == 1
    assert "no-such-preset" in process.stderr


def test_the_key_is_sent(folder: Path, start_server: Start) -> None:
    with start_server(api_key="secret") as server:
        server.wait_until_ready()
        without = run_node(folder, server.url, "encode.js", "a cat")
        process = run_node(folder, server.url, "encode.js", "a cat", QWEN3_ENCODER_API_KEY="secret")

    assert (without.returncode, process.returncode) == (1, 0)


def test_a_busy_service_is_asked_again(folder: Path, start_server: Start) -> None:
    """While the model loads it answers 503."""
    with start_server() as server:
        process = run_node(folder, server.url, "encode.js", "a cat")

    assert process.returncode == 0, process.stderr


def test_typescript_knows_the_types(folder: Path) -> None:
    """The README's example, checked strictly."""
    [code] = re.findall(r"```ts\n(.*?)```", (SOURCE / "README.md").read_text(), flags=re.DOTALL)
    (folder / "readme.ts").write_text(code)
    npm_install(folder, "--no-save", "typescript@5", "@types/node@20")
    options = ["--strict", "--noEmit", "--module", "nodenext", "--target", "es2022", "--skipLibCheck"]
    process = run_node(folder, "", "node_modules/typescript/bin/tsc", *options, "readme.ts")

    assert process.returncode == 0, process.stdout


@pytest.fixture
def page(folder: Path, server: RunningServer) -> Iterator[str]:
    """The address of the page."""
    process = subprocess.Popen(
        [str(NODE), "serve.js", "0"],
        cwd=folder,
        env=os.environ | {"QWEN3_ENCODER_URL": server.url},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_page_and_service_have_one_origin(page: str, server: RunningServer) -> None:
    """Everything that the page asks for is there, under relative addresses."""
    body = {"prompt": "a cat", "preset": "z-image"}
    html = httpx.get(page).raise_for_status()
    asked = [*re.findall(r'"(\./[^"]+js)"', html.text), "./node_modules/@msgpack/msgpack/dist.esm/decode.mjs"]

    assert html.headers["content-type"].startswith("text/html")
    assert len(asked) == 3
    for address in asked:
        assert httpx.get(page + address).raise_for_status().headers["content-type"] == "text/javascript"
    assert httpx.post(f"{page}encode", json=body).content == httpx.post(f"{server.url}/encode", json=body).content


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        pytest.param("", {"host": "evil.example"}, 403, id="other-host"),
        pytest.param("..%2f..%2fetc/passwd", {}, 404, id="outside"),
        pytest.param("package.json", {}, 404, id="not-part-of-the-page"),
        pytest.param("metrics", {}, 404, id="other-routes-of-the-service"),
    ],
)
def test_the_web_server_of_the_page_serves_nothing_else(
    page: str, path: str, headers: dict[str, str], status: int
) -> None:
    assert httpx.get(page + path, headers=headers).status_code == status


def test_a_browser_encodes_on_the_page(page: str, tmp_path: Path) -> None:
    """With the module that the import map names, and no CORS."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    process = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=20000",
            "--dump-dom",
            f"{page}?run",
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert "demo, z-image: 24 × 32\n3.125" in process.stdout, process.stdout[-500:] + process.stderr[-500:]
