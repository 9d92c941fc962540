"""The encoder beside mflux's on the same MLX, with OpenBLAS under both and with the reference BLAS under mflux.

    pip install --no-deps mflux==0.24.0 && pip install platformdirs piexif toml     # mflux requires a CUDA build
    python -m benchmarks.beside_mflux [--count 1] [--layers 28] [--layers-without 3]

Both sides run in process, from the prompt to evaluated prompt embeds, with the dims of Qwen3-0.6B and random weights in
float32. mflux pads to 512 tokens and runs all layers. Without OpenBLAS it needs minutes for a prompt, so that case is
measured once, on few layers, and FLUX.2 klein then takes the outputs of the first three.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoints import QWEN3_0_6B, read_prompts, read_weights, write_checkpoint
from benchmarks.report import Row, compare, report
from benchmarks.workers import Case, Result, Worker, answer_requests, take_turns

MODULE = "benchmarks.beside_mflux"
PRESETS = ("z-image", "flux2-klein")
KLEIN_LAYERS = (8, 17, 26)
GOAL = 1.0


def measure(count: int = 1, layers: int = 28, layers_without: int = 3) -> list[Row]:
    """A row for each preset and each BLAS under mflux; none where mflux is not installed."""
    if find_spec("mflux") is None:
        print("mflux is not installed; left out.")
        return []
    prompts = sorted(read_prompts(), key=len)
    middle = [prompts[round(at)] for at in np.linspace(0, len(prompts) - 1, count + 2)[1:-1]]
    with_blas = f"mflux with OpenBLAS over ours, {count} prompt{'s' * (count > 1)}, {layers} layers"
    without = f"mflux as it comes over ours, one prompt, {layers_without} layers"
    return _rows("mflux", layers, middle, with_blas, rounds=1) + _rows(
        "mflux alone", layers_without, middle[:1], without, rounds=0
    )


def _rows(peer: str, layers: int, prompts: Sequence[str], what: str, rounds: int) -> list[Row]:
    cases = [Case(f"{preset}: {prompt}", [preset, prompt], ("ours", peer)) for preset in PRESETS for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), QWEN3_0_6B, layers)
        options = ("--folder", folder, "--layers", str(layers))
        with Worker(MODULE, "--work", "ours", *options) as ours, Worker(MODULE, "--work", peer, *options) as theirs:
            seconds = take_turns({"ours": ours, peer: theirs}, cases, rounds)
    rows = []
    for preset in PRESETS:
        of_preset = [row for case, row in seconds.items() if case.startswith(preset)]
        medians = {side: statistics.median(row[side] for row in of_preset) for side in ("ours", peer)}
        rows.append(compare(f"{preset} in process: {what}", MODULE, medians, GOAL))
    return rows


def klein_layers(layers: int) -> tuple[int, int, int]:
    """FLUX.2 klein's own layers if the model has that many, otherwise the first three."""
    return KLEIN_LAYERS if layers > max(KLEIN_LAYERS) else (0, 1, 2)


def load_ours(folder: Path, layers: int) -> Any:
    from encoder import ModelOptions, TextEncoder, get_preset

    encoder = TextEncoder.open(ModelOptions(str(folder)))
    klein = replace(get_preset("flux2-klein"), layers=klein_layers(layers))
    presets = {"z-image": get_preset("z-image"), "flux2-klein": klein}

    def run(request: tuple[str, str]) -> Result:
        preset, prompt = request
        [embeds] = encoder.encode([prompt], presets[preset], "float32")
        return embeds.hidden_states

    return run


def load_mflux(folder: Path, layers: int, blas: bool) -> Any:
    if blas:
        import encoder  # isort: skip  # noqa: F401  # loads OpenBLAS; must come before mlx.core
    import mlx.core as mx
    import transformers
    from mflux.models.common.config import ModelConfig
    from mflux.models.common.tokenizer import LanguageTokenizer
    from mflux.models.flux2.model.flux2_text_encoder.prompt_encoder import Flux2PromptEncoder
    from mflux.models.flux2.model.flux2_text_encoder.qwen3_text_encoder import Qwen3TextEncoder
    from mflux.models.z_image.model.z_image_text_encoder.prompt_encoder import PromptEncoder
    from mflux.models.z_image.model.z_image_text_encoder.text_encoder import TextEncoder
    from mlx.utils import tree_unflatten

    mx.set_default_device(mx.cpu)
    ModelConfig.precision = mx.float32  # of the result for z-image; mflux's pipeline takes bfloat16
    dims = asdict(QWEN3_0_6B) | {"num_hidden_layers": layers, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    models = {"z-image": TextEncoder(**dims), "flux2-klein": Qwen3TextEncoder(**dims)}
    weights = tree_unflatten(read_weights(folder))
    for model in models.values():
        model.update(weights)
        mx.eval(model.parameters())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat: dict[str, LanguageTokenizer] = {
        preset: LanguageTokenizer(
            tokenizer, use_chat_template=True, chat_template_kwargs={"enable_thinking": preset == "z-image"}
        )
        for preset in PRESETS
    }
    after = tuple(layer + 1 for layer in klein_layers(layers))

    def run(request: tuple[str, str]) -> Result:
        preset, prompt = request
        if preset == "z-image":
            embeds = PromptEncoder.encode_prompt(prompt, chat[preset], models[preset])
        else:
            embeds, _ = Flux2PromptEncoder.encode_prompt(
                prompt, chat[preset], models[preset], text_encoder_out_layers=after
            )
        mx.eval(embeds)
        return np.array(embeds)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1, help="prompts")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--layers-without", type=int, default=3, help="where mflux runs without OpenBLAS")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--work", choices=("ours", "mflux", "mflux alone"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work == "ours":
        answer_requests(load_ours(options.folder, options.layers))
    elif options.work:
        answer_requests(load_mflux(options.folder, options.layers, blas=options.work == "mflux"))
    else:
        with report(options.output) as rows:
            rows += measure(options.count, options.layers, options.layers_without)


if __name__ == "__main__":
    main()
