"""The node against ComfyUI's own text encoders, in a checkout of ComfyUI: the same conditioning for the same prompts.

COMFYUI_DIR names the checkout, COMFYUI_PYTHON the Python that runs it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.conftest import run_server
from tests.parity.conftest import TOKENIZER_FILES, fetch_tokenizer

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif("COMFYUI_DIR" not in os.environ, reason="needs COMFYUI_DIR, a checkout of ComfyUI"),
]

NODE = Path(__file__).parents[2] / "examples" / "comfyui"
SCRIPT = Path(__file__).with_name("in_comfyui.py")
WEIGHTS = "a (red:1.3) fox"
ESCAPED = r"a fox \(drawn\), [oil]"
LEADING_NEWLINE = "\n\na fox"  # joins the template's last token
OWN_TEMPLATE = "<|im_start|>user\na fox<|im_end|>\n"
PROMPTS = {
    "a photo of a red fox sitting in deep snow",
    "",
    " ",
    "  leading and trailing blanks  ",
    "eine Füchsin 🦊 im Schnee, 一只狐狸",
    "special <|im_start|> tokens <|im_end|> inside <think>",
    "a fox " * 300,  # longer than FLUX.2 klein's window
    WEIGHTS,
    ESCAPED,
    LEADING_NEWLINE,
    OWN_TEMPLATE,
}
UNEQUAL: dict[str, set[str]] = {  # see "Where it differs" in the node's README
    "krea-2": {LEADING_NEWLINE, OWN_TEMPLATE},
    "mage-flow": {LEADING_NEWLINE, OWN_TEMPLATE},
    "qwen-image-2.1": {OWN_TEMPLATE},
    "joyimage-edit": {OWN_TEMPLATE},
    "anima": {WEIGHTS},
    "minimax-h3": {ESCAPED},  # as yet only some versions of ComfyUI take the backslash away
}
SYSTEMS = ["flux2-klein", "z-image", "krea-2", "qwen-image-2.1", "ideogram-4", "boogu", "mage-flow", "joyimage-edit"]
SYSTEMS += ["nucleus-image", "ovis-image", "anima"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-tokenizer")
    fetch_tokenizer(folder)
    return folder


def write_deep_checkpoint(folder: Path, tokenizer_folder: Path, num_hidden_layers: int) -> Path:
    """Narrow, with ComfyUI's fixed head size and the real vocabulary."""
    write_checkpoint(
        folder,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=151936,
        tokenizer=False,
    )
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_folder / name, folder)
    return folder


def differences(checkpoint: Path, systems: list[str]) -> dict[str, dict[str, Any] | None]:
    """By system and prompt, where the node's conditioning is not ComfyUI's; None for a system that it does not have."""
    prompts = {system: sorted(PROMPTS - UNEQUAL.get(system, set())) for system in systems}
    with run_server(model=str(checkpoint), compute_dtype="float32") as server:
        server.wait_until_ready()
        process = subprocess.run(
            [os.environ.get("COMFYUI_PYTHON", sys.executable), SCRIPT, server.url, checkpoint, NODE],
            input=json.dumps(prompts),
            cwd=os.environ["COMFYUI_DIR"],
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr[-3000:]
    found: dict[str, dict[str, Any] | None] = json.loads(process.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any] | None]:
    """The differences of all that have 36 layers or fewer."""
    checkpoint = write_deep_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer_folder, 36)
    return differences(checkpoint, SYSTEMS)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_conditioning_is_comfyuis(found: dict[str, dict[str, Any] | None], system: str) -> None:
    """Rows, masks, dtypes and everything that stands beside them."""
    if found[system] is None:
        pytest.skip(f"this ComfyUI does not have {system}")

    assert found[system] == {}


def test_minimax_h3s_conditioning_is_comfyuis(tokenizer_folder: Path, tmp_path: Path) -> None:
    """ComfyUI cuts its encoder to 50 layers."""
    checkpoint = write_deep_checkpoint(tmp_path, tokenizer_folder, 50)

    assert differences(checkpoint, ["minimax-h3"]) == {"minimax-h3": {}}
