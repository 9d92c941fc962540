"""The node for ComfyUI, without ComfyUI: its functions against a real service."""

import http.server
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from app.client import Client
from tests.conftest import RunningServer, Start

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")

FOLDER = Path(__file__).parents[2] / "examples" / "comfyui"
PROMPT = "a red fox 🦊 in deep snow"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.json"))  # ComfyUI lists what lies in a folder of this name
FILES = ["flux2_klein.json", "z_image.json"]
API_WORKFLOWS = sorted((FOLDER / "api").glob("*.json"))


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """The folder, imported as ComfyUI imports what lies in custom_nodes: by its path, under a made-up name."""
    spec = importlib.util.spec_from_file_location("custom_nodes_comfyui", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith(spec.name)]:
        del sys.modules[name]


@pytest.fixture
def nodes(package: ModuleType) -> ModuleType:
    return sys.modules["custom_nodes_comfyui.nodes"]


@pytest.fixture
def node(package: ModuleType) -> Any:
    return package.NODE_CLASS_MAPPINGS["Qwen3EncoderRemote"]()


@pytest.fixture(scope="module")
def embeds(server: RunningServer) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def test_the_folder_needs_nothing_that_comfyui_lacks() -> None:
    """No step of an installation follows the copying."""
    imported = {
        match
        for file in FOLDER.glob("*.py")
        for match in re.findall(r"^ *(?:from|import) ([a-z_0-9]+)", file.read_text(), flags=re.MULTILINE)
    }

    assert imported - sys.stdlib_module_names == {"torch", "safetensors", "comfy"}
    assert [line for line in (FOLDER / "requirements.txt").read_text().splitlines() if line[0] != "#"] == []


def test_every_input_arrives_and_both_outputs_have_names(package: ModuleType, node: Any) -> None:
    """ComfyUI calls the function with the inputs by name."""
    required = node.INPUT_TYPES()["required"]

    assert list(required) == ["server", "preset", "prompt", "negative"]
    assert set(required) <= set(type(node).encode.__annotations__)
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == 2
    assert package.NODE_DISPLAY_NAME_MAPPINGS.keys() == package.NODE_CLASS_MAPPINGS.keys()


def test_flux2_klein_is_512_rows_and_their_mask(server: RunningServer, node: Any, embeds: Client) -> None:
    """As ComfyUI pads it, with what the model computes in the padding."""
    [[rows, beside]], [[negative, _]] = node.encode(server.url, "flux2-klein", PROMPT, "blurry")
    theirs = embeds.encode(PROMPT, preset="flux2-klein", dtype="float32")

    assert (rows.shape, rows.dtype) == ((1, 512, 96), torch.float32)
    assert torch.equal(rows, theirs.torch())
    assert beside.keys() == {"pooled_output", "attention_mask"} and beside["pooled_output"] is None
    assert beside["attention_mask"].dtype == torch.int64
    assert beside["attention_mask"].sum() == theirs.num_tokens[0] < 512
    assert torch.equal(negative, embeds.encode("blurry", preset="flux2-klein", dtype="float32").torch())


def test_z_image_is_the_rows_of_its_tokens(server: RunningServer, node: Any, embeds: Client) -> None:
    [[rows, beside]], [[empty, _]] = node.encode(server.url, "z-image", PROMPT, "")
    theirs = embeds.encode(PROMPT, preset="z-image", dtype="float32")

    assert torch.equal(rows[0], theirs.rows(0).torch())
    assert torch.equal(beside["attention_mask"], torch.ones(1, rows.shape[1], dtype=torch.int64))
    assert empty.shape[1] == embeds.encode("", preset="z-image").num_tokens[0]  # an empty prompt has its template


def test_krea_2_is_flattened_layer_after_layer(server: RunningServer, node: Any, embeds: Client) -> None:
    """(1, rows, 12 * D) without padding in its middle, and without a mask."""
    [[rows, beside]], _ = node.encode(server.url, "krea-2", PROMPT, "")
    theirs = embeds.encode(PROMPT, preset="krea-2", dtype="float32").rows(0).torch()

    assert beside.keys() == {"pooled_output"}
    assert rows.shape == (1, len(theirs), 12 * 32)
    assert torch.equal(rows[0, :, 32:64], theirs[:, 1])


def test_a_long_prompt_is_not_truncated(server: RunningServer, node: Any) -> None:
    """ComfyUI has no window."""
    [[rows, beside]], _ = node.encode(server.url, "flux2-klein", "a fox " * 150, "")

    assert rows.shape[1] > 512
    assert beside["attention_mask"].all()


def test_escaped_parentheses_are_parentheses(server: RunningServer, nodes: ModuleType) -> None:
    """As in every prompt of ComfyUI, also where weights mean nothing."""
    [[escaped, _]] = nodes.conditioning(server.url, "z-image", r"a fox \(drawn\)")
    [[plain, _]] = nodes.conditioning(server.url, "z-image", "a fox (drawn)")

    assert torch.equal(escaped, plain)


def test_an_empty_prompt_of_qwen_image_stays_empty(server: RunningServer, nodes: ModuleType, embeds: Client) -> None:
    """diffusers makes a blank of it, ComfyUI does not."""
    [[empty, _]] = nodes.conditioning(server.url, "qwen-image-2.1", "")
    [[blank, _]] = nodes.conditioning(server.url, "qwen-image-2.1", " ")

    assert empty.shape[1] == blank.shape[1] - 1


def test_all_systems_but_two_encode(server: RunningServer, package: ModuleType, nodes: ModuleType) -> None:
    """MiniMax-H3 takes a deeper checkpoint than the demo, Anima the tokenizer of ComfyUI."""
    systems = sys.modules["custom_nodes_comfyui.systems"].SYSTEMS
    refused = {}
    for preset in systems:
        try:
            [[rows, _]] = nodes.conditioning(server.url, preset, "a cat")
            assert rows.ndim == 3 and rows.shape[0] == 1 and rows.dtype == torch.float32
        except nodes.EncoderError as error:
            refused[preset] = str(error)

    assert refused.keys() == {"anima", "minimax-h3"}
    assert "T5 tokenizer of ComfyUI" in refused["anima"]
    assert "36 decoder layers" in refused["minimax-h3"]


def test_every_system_is_a_preset_of_the_service(server: RunningServer, package: ModuleType, embeds: Client) -> None:
    assert sys.modules["custom_nodes_comfyui.systems"].SYSTEMS.keys() <= embeds.presets().keys()


@pytest.mark.parametrize("preset", ["krea-2", "qwen-image-2.1", "mage-flow", "joyimage-edit"])
def test_a_template_of_ones_own_is_refused_where_rows_are_dropped(
    server: RunningServer, nodes: ModuleType, preset: str
) -> None:
    """ComfyUI looks for the tokens where its template ends; other rows than those would be painted."""
    with pytest.raises(nodes.EncoderError, match=f"{preset} has a template of its own"):
        nodes.conditioning(server.url, preset, "<|im_start|>user\na fox<|im_end|>\n")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param("127.0.0.1:8000", "is no address, expected one as http://", id="no-scheme"),
        pytest.param("file:///etc/passwd", "is no address", id="file"),
        pytest.param("http://127.0.0.1:9", "cannot be reached: .*Is the service running there?", id="nobody"),
    ],
)
def test_an_error_says_what_to_do(nodes: ModuleType, address: str, message: str) -> None:
    """ComfyUI shows it at the node."""
    with pytest.raises(nodes.EncoderError, match=message):
        nodes.conditioning(address, "z-image", PROMPT)


def test_the_services_own_message_is_shown(server: RunningServer, nodes: ModuleType) -> None:
    with pytest.raises(nodes.EncoderError, match=r"32000|32,000"):
        nodes.conditioning(server.url, "z-image", "a" * 32_001)


class Redirecting(http.server.BaseHTTPRequestHandler):
    """Another service, which sends its clients elsewhere."""

    def do_POST(self) -> None:
        self.send_response(307)
        self.send_header("location", "http://127.0.0.1:9/")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_no_redirect_is_followed(nodes: ModuleType) -> None:
    """It would carry prompt and key elsewhere; and the message says that another service answered."""
    with http.server.HTTPServer(("127.0.0.1", 0), Redirecting) as other:
        threading.Thread(target=other.handle_request).start()
        with pytest.raises(nodes.EncoderError, match=r"answered 307 .*Is the service running there\?"):
            nodes.conditioning(f"http://127.0.0.1:{other.server_port}", "z-image", PROMPT)


def test_the_key_goes_to_the_configured_server_alone(
    start_server: Start, nodes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workflow is a file that others write, and it names a server."""
    remote = sys.modules["custom_nodes_comfyui.remote"]
    monkeypatch.setenv("QWEN3_ENCODER_API_KEY", "secret")
    with start_server(api_key="secret") as server:
        server.wait_until_ready()
        with pytest.raises(nodes.EncoderError, match="key"):
            nodes.conditioning(server.url, "z-image", PROMPT)

        monkeypatch.setattr(remote, "DEFAULT_SERVER", server.url)
        [[rows, _]] = nodes.conditioning(f"{server.url}/", "z-image", PROMPT)

    assert rows.shape[0] == 1


def test_comfyui_encodes_again_when_another_checkpoint_is_served(server: RunningServer, node: Any) -> None:
    """What IS_CHANGED returns is compared with what it returned before; a server that is gone changes nothing."""
    inputs = {"preset": "z-image", "prompt": "a", "negative": ""}
    before = node.IS_CHANGED(server=server.url, **inputs)

    assert httpx.get(f"{server.url}/info").json()["fingerprint"] in before
    assert node.IS_CHANGED(server=server.url, **inputs) == before
    assert node.IS_CHANGED(server=None, **inputs) == node.IS_CHANGED(server="http://127.0.0.1:9", **inputs) == ""


def test_a_server_that_is_gone_leaves_the_last_answer(start_server: Start, node: Any) -> None:
    with start_server() as server:
        server.wait_until_ready()
        before = node.IS_CHANGED(server=server.url)

    assert before
    assert node.IS_CHANGED(server=server.url) == before


def test_there_is_a_workflow_for_the_editor_and_one_for_the_api() -> None:
    assert [file.name for file in WORKFLOWS] == [file.name for file in API_WORKFLOWS] == FILES


@pytest.mark.parametrize("file", [*WORKFLOWS, *API_WORKFLOWS], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_workflow_gives_the_node_its_inputs(package: ModuleType, node: Any, file: Path) -> None:
    """In the order in which they are shown, and with a preset that there is."""
    required = node.INPUT_TYPES()["required"]
    workflow = json.loads(file.read_text())
    if "nodes" in workflow:
        [values] = [n["widgets_values"] for n in workflow["nodes"] if n["type"] in package.NODE_CLASS_MAPPINGS]
        inputs = dict(zip(required, values, strict=True))
    else:
        [inputs] = [n["inputs"] for n in workflow.values() if n["class_type"] in package.NODE_CLASS_MAPPINGS]

    assert inputs.keys() == required.keys()
    assert inputs["server"] == "http://127.0.0.1:8000"
    assert inputs["preset"] in required["preset"][0]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_the_links_of_a_workflow_fit_together(file: Path) -> None:
    """Each joins an output and an input that know of it, and that have its type."""
    workflow = json.loads(file.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}

    assert workflow["links"]
    for link, source, output, target, place, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][place]["type"] == kind


@pytest.mark.parametrize("name", FILES)
def test_both_forms_of_a_workflow_are_the_same(name: str) -> None:
    """Node for node, link for link; a seed has one more value in the editor, what becomes of it after a run."""
    editor = json.loads((FOLDER / "workflows" / name).read_text())
    api = json.loads((FOLDER / "api" / name).read_text())
    links = {link: [str(source), output] for link, source, output, *_ in editor["links"]}

    assert api.keys() == {str(node["id"]) for node in editor["nodes"]}
    for node in editor["nodes"]:
        inputs = api[str(node["id"])]["inputs"]
        linked = {entry["name"]: links[entry["link"]] for entry in node["inputs"]}
        assert api[str(node["id"])]["class_type"] == node["type"]
        assert {key: value for key, value in inputs.items() if isinstance(value, list)} == linked
        assert [value for value in inputs.values() if not isinstance(value, list)] == [
            value for value in node["widgets_values"] if value != "randomize"
        ]
