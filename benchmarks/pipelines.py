"""POST /encode beside the prompt encoding of diffusers' own pipelines: same weights, same prompts, in turn.

    python -m benchmarks.pipelines [--presets z-image flux2-klein] [--prompts FILE] [--count 4] [--tokenizer FOLDER]

Both have the dims of Qwen3-0.6B and random weights. The service runs with its defaults, bypasses its cache and replies
in bfloat16. The pipeline has the text encoder class that its repository names and no other component, in float32 on
PyTorch.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoints import PROMPTS, QWEN3_0_6B, read_prompts, write_checkpoint
from benchmarks.report import Row, compare, report
from benchmarks.service import Connection, Service
from benchmarks.workers import Answer, Case, Result, Side, Worker, answer_requests, take_turns, timed

MODULE = "benchmarks.pipelines"
GOALS = {"z-image": 10.0, "flux2-klein": 1.5}
PEERS = {"z-image": "ZImagePipeline.encode_prompt", "flux2-klein": "Flux2KleinPipeline.encode_prompt"}


def measure(
    presets: Sequence[str] = tuple(GOALS),
    prompts: Path = PROMPTS,
    count: int = 4,
    tokenizer: Path | None = None,
    layers: int = 28,
) -> list[Row]:
    """A row for each preset, of medians over `count` prompts of the file, from its shortest to its longest."""
    texts = sorted(read_prompts(prompts), key=len)
    chosen = [texts[round(at)] for at in np.linspace(0, len(texts) - 1, count)]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), QWEN3_0_6B, layers, tokenizer, texts)
        with Service(folder) as service:
            return [_row(preset, folder, service.connect(), chosen) for preset in presets]


def _row(preset: str, folder: str, connection: Connection, prompts: Sequence[str]) -> Row:
    cases = [Case(prompt, prompt, ("ours", "diffusers")) for prompt in prompts]
    with Worker(MODULE, "--work", preset, "--folder", folder) as peer:
        sides: dict[str, Side] = {"ours": encode(connection, preset), "diffusers": peer}
        for side in sides.values():
            side(prompts[0])  # warms up
        seconds = take_turns(sides, cases, rounds=0)
    medians = {side: statistics.median(row[side] for row in seconds.values()) for side in ("ours", "diffusers")}
    what = f"POST /encode {preset}, {len(prompts)} prompts: {PEERS[preset]} of diffusers over ours"
    return compare(what, MODULE, medians, GOALS[preset])


def encode(connection: Connection, preset: str) -> Callable[[str], Answer]:
    """The service as one side. The time includes unpacking the reply, as a client does."""

    def run(prompt: str) -> NDArray[Any]:
        reply = connection.post("/encode", {"prompt": prompt, "preset": preset})
        bits = np.frombuffer(msgpack.unpackb(reply.body)["hidden_states"]["data"], np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    return lambda prompt: timed(run, prompt)


def work(preset: str, folder: Path) -> None:
    """Answer each prompt with the pipeline's prompt_embeds."""
    import diffusers
    import torch
    import transformers

    none = {"scheduler": None, "vae": None, "transformer": None}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if preset == "z-image":
        encoder: Any = transformers.Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()
        pipeline: Any = diffusers.ZImagePipeline(text_encoder=encoder, tokenizer=tokenizer, **none)
        options: dict[str, Any] = {"do_classifier_free_guidance": False}
    else:
        encoder = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        pipeline = diffusers.Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **none)
        options = {}

    def run(prompt: str) -> Result:
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(prompt, device="cpu", **options)
        return np.asarray(embeds[0].numpy())

    answer_requests(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--presets", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a file with one prompt a line")
    parser.add_argument("--count", type=int, default=4, help="prompts to measure of that file")
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json; else one is made of the prompts")
    parser.add_argument("--layers", type=int, default=28, help="of the checkpoint; FLUX.2 klein needs 27")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--work", choices=list(GOALS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.folder)
        return
    with report(options.output) as rows:
        rows += measure(options.presets, options.prompts, options.count, options.tokenizer, options.layers)


if __name__ == "__main__":
    main()
