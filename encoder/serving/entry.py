"""A job on its way through the service, and who waits for it."""

from asyncio import Future
from dataclasses import dataclass, field

from encoder.pipeline.selection import Outcome
from encoder.serving.deadline import RequestStage
from encoder.types import Job, Pass


@dataclass(eq=False, slots=True)
class Entry:
    """A job that is looked up, waits in the queue, or runs.

    Times are in seconds of time.perf_counter, and 0 until they are known.

    Attributes:
        job: what to compute.
        store: whether its result may be cached.
        is_probe: whether no request wants it, but the guardian.
        length: rows that it adds to a batch, live padding included; at least 1.
        outcome: None until the entry is settled.
        waiters: a future for each request that wants it; they are resolved when it is settled.
        stage: where it is, or was last.
        request: the number of the request that queued it.
        from_disk: whether its result was found on disk, so that it never ran.
        last_pass: the pass that it ran in, where passes are measured.
    """

    job: Job
    store: bool = True
    is_probe: bool = False
    length: int = field(init=False)
    outcome: Outcome | None = None
    waiters: "list[Future[None]]" = field(default_factory=list)
    stage: RequestStage = "disk_cache"
    request: int = 0
    from_disk: bool = False
    started_at: float = 0.0
    finished_at: float = 0.0
    last_pass: Pass | None = None

    def __post_init__(self) -> None:
        self.length = max(1, self.job.computed_rows)
