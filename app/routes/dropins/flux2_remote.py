"""`POST /predict`: the remote text encoder of FLUX.2, as Hugging Face ran one.

Clients: diffusers, modular_pipelines/flux2/encoders.py, Flux2RemoteTextEncoderStep, which has the address in its class
attribute REMOTE_URL; diffusers, examples/dreambooth/train_dreambooth_lora_flux2*.py; flux2, docs/flux2_dev_hf.md.
They send `Authorization: Bearer <Hugging Face token>`, or `Bearer None`; see KeyCheck in app/access/keys.py.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.reply import torch_file
from app.reply.formats import FORMATS
from app.reply.reply import respond
from app.request.body import read_body
from app.request.deadline import deadline_of
from app.request.query import QueryRoute
from app.routes.dropins.fields import DropInRequest, DTypeQuery, PresetQuery, Prompts
from app.routes.encoding import encode_prompts, timings
from app.routes.openapi import drop_in
from app.service import ServiceDep

router = APIRouter(route_class=QueryRoute)


class PredictRequest(DropInRequest):
    """One prompt or several; null is the empty prompt."""

    prompt: Prompts


PREDICT = drop_in(
    PredictRequest,
    {"as the modular step sends it": {"prompt": ["a cat"]}, "as the trainers send it": {"prompt": "a cat"}},
    torch_file.MEDIA_TYPE,
    "prompt_embeds (B, 512, 3·D) as torch.save writes them.",
)


@router.post("/predict", **PREDICT)
async def predict(
    request: Request, service: ServiceDep, preset: PresetQuery = None, dtype: DTypeQuery = "bfloat16"
) -> Response:
    """Encode prompts for FLUX.2, as diffusers' Flux2RemoteTextEncoderStep and its trainers ask for them."""
    body = await read_body(request, PredictRequest, service.settings)
    wanted = service.catalog.get(service.settings.predict_preset if preset is None else preset)
    result = await encode_prompts(request, service, body.prompt, wanted, dtype)
    return await respond(FORMATS[torch_file.MEDIA_TYPE], result.embeds, {}, timings(result), deadline_of(request))
