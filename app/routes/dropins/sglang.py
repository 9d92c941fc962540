"""`POST /sglang/encode`: what SGLang-diffusion serves as `POST /encode` with `--encode-only`.

Our own `/encode` has that path, and a body with nothing but a prompt fits both. So here the base address of a client is
`http://host:port/sglang`.
Source: sglang, multimodal_gen/runtime/entrypoints/post_training/encode_api.py, io_struct.py and utils.py.
"""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app import wire
from app.reply.reply import PartsResponse, collate
from app.request.body import read_body
from app.request.fields import Text
from app.request.query import QueryRoute
from app.routes.dropins.fields import DropInRequest, DTypeQuery, PresetQuery
from app.routes.encoding import encode_prompts, timings
from app.routes.openapi import drop_in
from app.service import ServiceDep
from app.wire import Tensor
from encoder import EncodeResult

router = APIRouter(route_class=QueryRoute)


class SGLangRequest(DropInRequest):
    """A prompt and its negative prompt. Fields for other models (seed, width, height, fps, ...) are ignored."""

    prompt: Text
    negative_prompt: Text | None = None
    image_path: None = Field(None, description="Refused: text is encoded here, and no file of the server is read.")
    video_path: None = Field(None, description="Refused: text is encoded here, and no file of the server is read.")


ENCODE = drop_in(
    SGLangRequest,
    {"prompt and negative": {"prompt": "a cat", "negative_prompt": "", "width": 1024, "height": 1024, "seed": 7}},
    wire.MSGPACK,
    "{request_id, prompt, encoder_output, inference_time_s}; tensors are {__tensor__, data, shape, dtype}, with data a "
    "safetensors file of one tensor `t`.",
)


@router.post("/sglang/encode", **ENCODE)
async def encode(
    request: Request, service: ServiceDep, preset: PresetQuery = None, dtype: DTypeQuery = "bfloat16"
) -> Response:
    """Encode a prompt, and its negative prompt if it has one, as SGLang-diffusion does."""
    body, catalog = await read_body(request, SGLangRequest, service.settings), service.catalog
    positive = catalog.get(preset)
    negative = positive if positive.negative_preset is None else catalog.get(positive.negative_preset)
    results = {"": await encode_prompts(request, service, [body.prompt], positive, dtype)}
    if body.negative_prompt is not None:
        negatives = [body.negative_prompt]
        results["negative_"] = await encode_prompts(request, service, negatives, negative, dtype)
    facts = {"request_id": request.scope["request_id"], "prompt": body.prompt}
    return PartsResponse(_pack(facts, results), timings(*results.values()), wire.MSGPACK)


def _pack(facts: dict[str, Any], results: dict[str, EncodeResult]) -> wire.Parts:
    encoder_output = {}  # prompt_embeds, prompt_attention_mask; negative_prompt_embeds, negative_attention_mask
    for side, result in results.items():
        hidden_states, attention_mask = collate(result.embeds)
        encoder_output[f"{side}prompt_embeds"] = _tensor(hidden_states)
        encoder_output[f"{side or 'prompt_'}attention_mask"] = _tensor(attention_mask)
    inference_time_s = sum(result.inference_ms for result in results.values()) / 1e3
    return wire.pack_parts(facts | {"encoder_output": encoder_output, "inference_time_s": inference_time_s})


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "__tensor__": True,
        "data": wire.Written(wire.pack_safetensors_parts({"t": tensor})),
        "shape": list(tensor.array.shape),
        "dtype": f"torch.{tensor.dtype}",
    }
