"""Counts requests, and renders all metrics for Prometheus. What they are called: exposition.py.

Counting takes a microsecond of a request; everything else is read and formatted at a scrape. Label values are routes,
statuses, error codes, stages and states of ours, never what a client has sent: so series are few.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.registry import Collector

from app.errors import ANSWERS, OTHER_CODES
from app.profile import STAGES, Profile
from encoder import Distribution, EncodeResult, NotReady, RequestStage

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MAX_SCRAPE_S = 10.0  # as long as Prometheus waits by default


class Metrics:
    """The counts of one app, and its scrapes. Belongs to the event loop.

    Attributes:
        requests: answered, by route and status.
        seconds: from a request to the header of its response, by route.
        errors: requests answered with an error, by its code.
        expired: requests whose time was over, by where they were then.
        stages: seconds of each stage of a request.
        prompt_tokens: tokens of a prompt, template included.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = defaultdict(int)
        self.seconds: dict[str, Distribution] = defaultdict(lambda: Distribution(SECONDS))
        self.errors = defaultdict(int, dict.fromkeys([*(code for _, code in ANSWERS.values()), *OTHER_CODES], 0))
        self.expired = defaultdict(int, dict.fromkeys(get_args(RequestStage), 0))
        self.stages = {stage: Distribution(SECONDS) for stage in STAGES}
        self.prompt_tokens = Distribution(TOKENS)
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._scrape: Awaitable[bytes] | None = None

    def observe_request(self, route: str, status: int, seconds: float, request: Profile) -> None:
        """Count an answered request.

        Args:
            route: the path of the route, not of the request, which keeps labels few.
            seconds: from the request to the header of its response.
        """
        self.requests[route, status] += 1
        self.seconds[route].observe(seconds)
        if request.code:
            self.errors[request.code] += 1
            if request.expired_in:
                self.expired[request.expired_in] += 1
        for stage, (_, took) in request.timed.items():
            self.stages[stage].observe(took)

    def observe_result(self, result: EncodeResult) -> None:
        """Record the sizes of an encoded request."""
        for prompt in result.prompts:
            self.prompt_tokens.observe(len(prompt.input_ids))

    def register(self, collector: Collector) -> None:
        """Show what a collector has at every scrape."""
        self.registry.register(collector)

    async def render(self) -> bytes:
        """The metrics in the text format of Prometheus. Scrapes at the same time share one.

        A thread of its own formats them: that takes milliseconds, and the threads that requests use may all be busy.

        Errors: NotReady after MAX_SCRAPE_S.
        """
        if self._scrape is None:
            self._scrape = asyncio.ensure_future(self._render())
        try:
            return await asyncio.wait_for(asyncio.shield(self._scrape), MAX_SCRAPE_S)
        except TimeoutError as error:
            raise NotReady(f"The metrics were not ready within {MAX_SCRAPE_S:g} s.", 1) from error

    async def _render(self) -> bytes:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, generate_latest, self.registry)
        finally:
            self._scrape = None
