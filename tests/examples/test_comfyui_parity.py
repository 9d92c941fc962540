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
PROMPTS = [
    "a photo of a red fox sitting in deep snow",
    "",
    " ",
    "  leading and trailing blanks  ",
    "eine Füchsin 🦊 im Schnee, 一只狐狸",
    r"escaped \(parentheses\) and (weights:1.3), [brackets]",
    "special <|im_start|> tokens <|im_end|> inside <think>",
    "a fox " * 300,  # longer than FLUX.2 klein's window
]
EDGE_OF_THE_TEMPLATE = "\n\na leading newline"  # joins the template's last token
OWN_TEMPLATE = "<|im_start|>user\na fox<|im_end|>\n"
DROPS_BY_TOKENS = ("krea-2", "mage-flow")  # see the node's README
FIFTY_LAYERS = ("minimax-h3",)
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


def differences(checkpoint: Path, systems: list[str], prompts: list[str]) -> dict[str, Any]:
    """By system and prompt, where the node's conditioning is not ComfyUI's."""
    with run_server(model=str(checkpoint), compute_dtype="float32") as server:
        server.wait_until_ready()
        process = subprocess.run(
            [os.environ.get("COMFYUI_PYTHON", sys.executable), SCRIPT, server.url, checkpoint, NODE, *systems],
            input=json.dumps(prompts),
            cwd=os.environ["COMFYUI_DIR"],
            capture_output=True,
            text=True,
        )
    assert process.returncode == 0, process.stderr[-3000:]
    by_system: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return by_system


@pytest.fixture(scope="module")
def by_system(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return differences(write_deep_checkpoint(folder, tokenizer_folder, 36), SYSTEMS, [*PROMPTS, EDGE_OF_THE_TEMPLATE])


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_conditioning_is_comfyuis(by_system: dict[str, Any], system: str) -> None:
    """Rows, masks, dtypes and everything that stands beside them."""
    by_prompt = by_system[system]
    if by_prompt is None:
        pytest.skip(f"this ComfyUI does not have {system}")
    if system in DROPS_BY_TOKENS:
        del by_prompt[EDGE_OF_THE_TEMPLATE]

    assert {prompt: found for prompt, found in by_prompt.items() if found} == {}


def test_minimax_h3s_conditioning_is_comfyuis(tokenizer_folder: Path, tmp_path: Path) -> None:
    """ComfyUI cuts its encoder to 50 layers."""
    [by_prompt] = differences(
        write_deep_checkpoint(tmp_path, tokenizer_folder, 50), ["minimax-h3"], [*PROMPTS, EDGE_OF_THE_TEMPLATE]
    ).values()

    assert {prompt: found for prompt, found in by_prompt.items() if found} == {}
