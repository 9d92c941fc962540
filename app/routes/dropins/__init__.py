"""Routes that speak the protocols of other text encoder services, for existing clients that cannot be changed.

Each file holds one protocol and names its source. Their requests run through the same engine as all others, with the
same limits and errors. docs/drop-ins.md says how to point each client here.
"""

from fastapi import APIRouter

from app.routes.dropins import flux2_remote, hidden_states, sdnext, sglang

router = APIRouter(tags=["drop-ins"])
for protocol in (flux2_remote, sdnext, sglang, hidden_states):
    router.include_router(protocol.router)
