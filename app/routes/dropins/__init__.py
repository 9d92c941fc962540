"""Routes that speak the protocols of other text encoder services, for clients that exist and cannot be changed.

Each file is one protocol and says whose. What they ask for runs through the same engine as everything else, under the
same limits and with the same errors; docs/drop-ins.md says how to point each client here.
"""

from fastapi import APIRouter

from app.routes.dropins import flux2_remote, hidden_states, sdnext, sglang

router = APIRouter(tags=["drop-ins"])
for protocol in (flux2_remote, sdnext, sglang, hidden_states):
    router.include_router(protocol.router)
