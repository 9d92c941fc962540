"""What the pipelines of diffusers take instead of prompts. Used by the client; needs nothing of the server."""

from app.pipelines.overrides import override as override
from app.pipelines.plan import Plan as Plan
