"""What the scripts share: their arguments, and where to compute."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch

from app.client import BASE_URL, Client

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def arguments(
    description: str | None, model: str | None, output: str, argv: Sequence[str] | None
) -> argparse.Namespace:
    """The command line; `model` is the default, without one it has to be given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("prompt")
    parser.add_argument("--negative", help="what the picture should not be; the pipeline's own default without")
    parser.add_argument(
        "--model", default=model, required=model is None, help="folder or Hugging Face id of the pipeline"
    )
    parser.add_argument("--server", default=BASE_URL, help="where the service listens")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", type=int, default=1024, help="of the picture, in pixels")
    parser.add_argument("--steps", type=int, help="the pipeline's own default without")
    parser.add_argument("--guidance", type=float, help="the pipeline's own default without")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=output)
    return parser.parse_args(argv)


def client(options: argparse.Namespace) -> Client:
    """A client of the service. The key is not an argument: other users of a machine can read those."""
    return Client(options.server, api_key=os.environ.get("QWEN3_ENCODER_API_KEY"))


def sampling(options: argparse.Namespace, guidance: str = "guidance_scale") -> dict[str, Any]:
    """The arguments of a call that say how to sample; `guidance` is what the pipeline calls it."""
    given = {"num_inference_steps": options.steps, guidance: options.guidance}
    return {
        "generator": torch.Generator("cpu").manual_seed(options.seed),
        **{name: value for name, value in given.items() if value is not None},
    }


def default_device() -> str:
    """CUDA, else Metal, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
