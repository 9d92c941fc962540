"""Runs inside ComfyUI: encodes prompts with its own text encoders and with the node, and prints how they compare.

python in_comfyui.py SERVER CHECKPOINT NODE < prompts.json, with a checkout of ComfyUI as the working directory; the
prompts are lists by preset.
"""

import asyncio
import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, ".")

import comfy.cli_args  # the others look at its arguments when they are imported

comfy.cli_args.args.cpu = True

import comfy.sd  # noqa: E402
import comfy.text_encoders.qwen3vl  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

TEXT_ENCODERS = {  # by preset: module, tokenizer, and the name under which the model's config may be changed
    "flux2-klein": ("flux", "KleinTokenizer", "qwen3_4b"),
    "z-image": ("z_image", "ZImageTokenizer", "qwen3_4b"),
    "krea-2": ("krea2", "Krea2Tokenizer", "qwen3vl_4b"),
    "qwen-image-2.1": ("qwen_image21", "QwenImage21Tokenizer", "qwen3vl_8b"),
    "ideogram-4": ("ideogram4", "Ideogram4Tokenizer", "qwen3vl_8b"),
    "boogu": ("boogu", "BooguTokenizer", "qwen3vl_8b"),
    "mage-flow": ("mage_flow", "MageFlowTokenizer", "qwen3vl_4b"),
    "joyimage-edit": ("joyimage", "JoyImageTokenizer", "qwen3vl_8b"),
    "nucleus-image": ("nucleus_image", "NucleusImageTokenizer", "qwen3_8b"),
    "ovis-image": ("ovis", "OvisTokenizer", "qwen3_2b"),
    "anima": ("anima", "AnimaTokenizer", "qwen3_06b"),
    "minimax-h3": ("minimax", "MiniMaxH3Tokenizer", "qwen3vl_32b"),
}
DIMS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SMALL_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "deepstack_visual_indexes": [0]}


def build_clip(system: str, checkpoint: Path) -> Any:
    """ComfyUI's CLIP of a system, around a checkpoint of any size.

    Errors: ModuleNotFoundError where this ComfyUI does not have the system.
    """
    module_name, tokenizer, name = TEXT_ENCODERS[system]
    module = importlib.import_module(f"comfy.text_encoders.{module_name}")
    config = json.loads((checkpoint / "config.json").read_text())
    dims = {key: config[key] for key in (*DIMS, "num_key_value_heads")} | {"rope_theta": 1e6}
    for vision in comfy.text_encoders.qwen3vl.QWEN3VL_VISION.values():
        vision.update(SMALL_VISION)  # no prompt here has a picture

    class Target:
        params: dict[str, Any] = {}  # noqa: RUF012
        clip = module.klein_te() if system == "flux2-klein" else module.te()

    Target.tokenizer = getattr(module, tokenizer)
    options = {"dtype": torch.float32, f"{name}_model_config": dims}
    clip = comfy.sd.CLIP(Target, model_options=options)
    missing, _ = clip.load_sd(load_file(checkpoint / "model.safetensors"))
    needed = [key for key in missing if key.startswith("model.") and "lm_head" not in key]
    assert not needed, needed
    return clip


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    """Where two conditionings differ; an empty dict where they are as good as equal."""
    [[our_rows, our_beside]], [[their_rows, their_beside]] = ours, theirs
    differences: dict[str, Any] = {}
    for name, our, their in [("rows", our_rows, their_rows)] + [
        (key, our_beside.get(key, "absent"), their_beside.get(key, "absent"))
        for key in sorted(our_beside.keys() | their_beside.keys())
    ]:
        if not (torch.is_tensor(our) and torch.is_tensor(their)):
            if our is not their:
                differences[name] = [repr(our), repr(their)]
        elif (our.shape, our.dtype, our.device) != (their.shape, their.dtype, their.device):
            differences[name] = [f"{our.dtype} {list(our.shape)}", f"{their.dtype} {list(their.shape)}"]
        elif name == "rows":
            error = ((our - their).abs().max() / their.abs().max()).item()
            if math.isnan(error) or error > 1e-4:
                differences[name] = error
        elif not torch.equal(our, their):
            differences[name] = "other values"
    return differences


def main(server: str, checkpoint: Path, node: str) -> None:
    """Print the differences by preset and prompt; null where this ComfyUI does not have the system."""
    assert asyncio.run(nodes.load_custom_node(node)), "the node does not load"
    ours = nodes.NODE_CLASS_MAPPINGS["Qwen3EncoderRemote"]()
    results: dict[str, Any] = {}
    for system, prompts in json.load(sys.stdin).items():
        try:
            clip = build_clip(system, checkpoint)
        except ModuleNotFoundError:
            results[system] = None
            continue
        found = {}
        for prompt in prompts:
            [theirs] = nodes.CLIPTextEncode().encode(clip, prompt)
            positive, negative = ours.encode(server, system, prompt, prompt)
            found[prompt] = compare(positive, theirs) | compare(negative, theirs)
        results[system] = {prompt: differences for prompt, differences in found.items() if differences}
    print(json.dumps(results))


with torch.inference_mode():
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
