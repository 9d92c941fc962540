"""`POST /te`: the remote text encoder of SD.Next.

Client: SD.Next, modules/sd_te_remote.py, with SD_REMOTE_T5 set to this address. It posts bare JSON, a string or a list,
and reads the bytes of the reply in the dtype of its own pipeline and the shape in the header `shape`.
"""

from fastapi import APIRouter, Request
from pydantic import ConfigDict, RootModel
from starlette.responses import Response

from app import wire
from app.reply.formats import FORMATS
from app.reply.reply import respond
from app.request.body import read_body
from app.request.deadline import deadline_of
from app.request.query import QueryRoute
from app.routes.dropins.fields import DTypeQuery, PresetQuery, Prompts
from app.routes.encoding import encode_prompts, timings
from app.routes.openapi import drop_in
from app.service import ServiceDep

router = APIRouter(route_class=QueryRoute)


class TextEncoderRequest(RootModel[Prompts]):
    """The prompts, without an object around them."""

    model_config = ConfigDict(strict=True)


TE = drop_in(
    TextEncoderRequest,
    {},
    wire.TENSOR,
    "The bytes of one tensor, little-endian and in C order; the headers `shape`, a JSON list, and `dtype` describe it.",
)


@router.post("/te", **TE)
async def te(
    request: Request, service: ServiceDep, preset: PresetQuery = None, dtype: DTypeQuery = "bfloat16"
) -> Response:
    """Encode prompts as SD.Next asks for them. The preset is the server's default or the one named in the address."""
    body = await read_body(request, TextEncoderRequest, service.settings)
    result = await encode_prompts(request, service, body.root, service.catalog.get(preset), dtype)
    return await respond(FORMATS[wire.TENSOR], result.embeds, {}, timings(result), deadline_of(request))
