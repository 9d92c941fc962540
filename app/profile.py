"""What is known of the request that is being served: its id, how it ended, and where its time went.

Code marks a stage with `with stage("parse"):`. Metrics, log lines and spans are made of it, and what profiler.py logs.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Literal

from encoder import EncodeResult

Stage = Literal["receive", "parse", "tokenize", "queue", "inference", "serialize", "send"]
# The name of each stage in metrics, and what it measures.
STAGES: dict[Stage, tuple[str, str]] = {
    "receive": ("receive", "Time from a request's headers to the end of its body."),
    "parse": ("parse", "Time from the bytes of a body to a checked request."),
    "tokenize": ("tokenization", "Time to tokenize a request."),
    "queue": ("queue", "Wait of a request until its last batch began."),
    "inference": ("inference", "Time of the forward pass of a request's last batch."),
    "serialize": ("serialization", "Time from hidden states to the bytes of a reply."),
    "send": ("send", "Time until the server had taken the last byte of a reply; the client may still be reading."),
}


class Profile:
    """One request.

    Args:
        request_id: in the header x-request-id.
        trace_id, span_id: of the trace that it belongs to, and of its own span; empty without.
    Attributes:
        code: of the error that it was answered with; empty without.
        expired_in: where it was when its time was over, as in DeadlineExceeded; empty if it was not.
        timed: when each stage first began, in seconds of time.perf_counter, and how many seconds it took in all; in the
            order in which they first ended.
        notes: on its forward passes, in words.
    """

    __slots__ = ("code", "expired_in", "notes", "request_id", "span_id", "timed", "trace_id")

    def __init__(self, request_id: str, trace_id: str = "", span_id: str = "") -> None:
        self.request_id = request_id
        self.trace_id = trace_id
        self.span_id = span_id
        self.code = self.expired_in = ""
        self.timed: dict[Stage, tuple[float, float]] = {}
        self.notes: list[str] = []

    def add(self, stage: Stage, began: float, seconds: float) -> None:
        """Add time to a stage."""
        if stage in self.timed:
            began, before = self.timed[stage]
            seconds += before
        self.timed[stage] = (began, seconds)

    @property
    def stages(self) -> dict[str, float]:
        """Milliseconds of each stage."""
        return {stage: seconds * 1e3 for stage, (_, seconds) in self.timed.items()}


current: ContextVar[Profile | None] = ContextVar("profile", default=None)  # in the task and the threads of a request
_UNMEASURED = nullcontext()


def stage(name: Stage) -> AbstractContextManager[None]:
    """Measure the block as a stage of the current request."""
    profile = current.get()
    return _UNMEASURED if profile is None else _Stage(profile, name)


class _Stage:
    __slots__ = ("began", "name", "profile")

    def __init__(self, profile: Profile, name: Stage) -> None:
        self.profile = profile
        self.name = name
        self.began = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.profile.add(self.name, self.began, time.perf_counter() - self.began)


def fail(code: str) -> None:
    """Note the code of the error that the current request is answered with."""
    profile = current.get()
    if profile is not None:
        profile.code = code


def expire(stage: str) -> None:
    """Note where the current request was when its time was over."""
    profile = current.get()
    if profile is not None:
        profile.expired_in = stage


def record(result: EncodeResult) -> None:
    """Add the times that the engine has just measured to the current request."""
    profile = current.get()
    if profile is None:
        return
    tokenization_s, queue_s, inference_s = (
        result.tokenization_ms / 1e3,
        result.queue_ms / 1e3,
        result.inference_ms / 1e3,
    )
    began = time.perf_counter() - inference_s
    profile.add("tokenize", began - queue_s - tokenization_s, tokenization_s)
    profile.add("queue", began - queue_s, queue_s)
    profile.add("inference", began, inference_s)
    profile.notes.append(result.cache)
    ran = result.last_pass
    if ran is not None:
        profile.notes.append(
            f"last pass: {ran.layers} layers, {ran.computed_tokens} tokens ({ran.real_tokens} real) of {ran.prompts} "
            f"prompts, forward {ran.forward_ms:.2f} + selection {ran.selection_ms:.2f} ms"
        )
