"""`POST /predict`: the remote text encoder of FLUX.2, as Hugging Face ran one.

Clients: diffusers, modular_pipelines/flux2/encoders.py, Flux2RemoteTextEncoderStep, which has the address in its class
attribute REMOTE_URL; diffusers, examples/dreambooth/train_dreambooth_lora_flux2*.py; flux2, docs/flux2_dev_hf.md.
They send `Authorization: Bearer <Hugging Face token>`, or `Bearer None`; see KeyCheck in app/middleware.py.
"""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from app import torch_file
from app.dependencies import CatalogDep, SettingsDep, body_of
from app.dropins.fields import DropInRequest, DTypeQuery, PresetQuery, Prompts
from app.encoding import EncodingDep, timings
from app.formats import ReplyFormat
from app.openapi import drop_in

router = APIRouter()


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
    body: Annotated[PredictRequest, Depends(body_of(PredictRequest))],
    settings: SettingsDep,
    catalog: CatalogDep,
    encoding: EncodingDep,
    preset: PresetQuery = None,
    dtype: DTypeQuery = "bfloat16",
) -> Response:
    """Encode prompts for FLUX.2, as diffusers' Flux2RemoteTextEncoderStep and its trainers ask for them."""
    result = await encoding.encode(body.prompt, catalog.get(preset or settings.predict_preset), dtype)
    response = await ReplyFormat(torch_file.MEDIA_TYPE).respond(result.embeds, {})
    response.headers.update(timings(result))
    return response
