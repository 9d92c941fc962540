"""When a request must have its answer, whatever stage it is in then."""

import time
from typing import Literal, NamedTuple

from encoder.errors import DeadlineExceeded

RequestStage = Literal["body", "tokenizing", "disk_cache", "queue", "model", "reply"]
STAGES: dict[RequestStage, str] = {  # what happens in each, as the end of a sentence
    "body": "while the body was read",
    "tokenizing": "while the prompts were tokenized",
    "disk_cache": "while the cache on disk was searched",
    "queue": "while the prompts waited for the model",
    "model": "while the model ran",
    "reply": "while the reply was built",
}


class Deadline(NamedTuple):
    """The end of a request's time.

    Attributes:
        timeout_s: the time that the request has in all, in seconds.
        ends_at: when that is over, in seconds of time.perf_counter.
    """

    timeout_s: float
    ends_at: float

    @classmethod
    def after(cls, timeout_s: float) -> "Deadline":
        """The deadline of a request that begins now."""
        return cls(timeout_s, time.perf_counter() + timeout_s)

    def left_s(self) -> float:
        """Seconds that are left, not below 0."""
        return max(0.0, self.ends_at - time.perf_counter())

    def exceeded(self, stage: RequestStage) -> DeadlineExceeded:
        """The error of a request whose time is over in this stage."""
        return DeadlineExceeded(
            f"No result within {self.timeout_s:g} s; the time ran out {STAGES[stage]}. "
            "Send fewer prompts, or allow more time.",
            stage,
        )
