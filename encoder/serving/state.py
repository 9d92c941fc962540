"""What the engine can do now: a state machine, whose transitions are data. Belongs to the event loop.

    loading ──▶ ready ◀──▶ suspect ──▶ restarting ──▶ ready
       └───────────┴──────────┴────────────┴──▶ failed

`loading` and `restarting`: no model yet, or no longer. `suspect`: something failed unexpectedly, and a probe finds out
whether the model still works; requests are served meanwhile. `failed`: this process will never serve again.
"""

import logging
import time
from collections.abc import Callable
from typing import Literal

logger = logging.getLogger(__name__)

StateName = Literal["loading", "ready", "suspect", "restarting", "failed"]
Event = Literal["works", "failure", "breaks", "gives_up"]

TRANSITIONS: dict[StateName, dict[Event, StateName]] = {
    "loading": {"works": "ready", "gives_up": "failed"},
    "ready": {"failure": "suspect", "breaks": "restarting", "gives_up": "failed"},
    "suspect": {"works": "ready", "breaks": "restarting", "gives_up": "failed"},
    "restarting": {"works": "ready", "gives_up": "failed"},
    "failed": {},
}
# Whoever runs the engine says what follows from `failed`.
LEVELS: dict[StateName, int] = {"suspect": logging.WARNING, "restarting": logging.WARNING}


class EngineState:
    """The state, since when, and why.

    Args:
        on_change: called after each transition.
    Attributes:
        name: of the state.
        reason: why it was entered.
        entered_at: when, in seconds since the epoch.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        self.name: StateName = "loading"
        self.reason = "The model is still loading."
        self.entered_at = time.time()
        self._on_change = on_change

    @property
    def serves(self) -> bool:
        """Whether requests are accepted."""
        return self.name in ("ready", "suspect")

    def on(self, event: Event, reason: str) -> bool:
        """Follow the transition for this event. False where there is none: the state stays as it is."""
        target = TRANSITIONS[self.name].get(event)
        if target is None:
            return False
        logger.log(LEVELS.get(target, logging.INFO), "%s, was %s: %s", target, self.name, reason)
        self.name, self.reason, self.entered_at = target, reason, time.time()
        self._on_change()
        return True
