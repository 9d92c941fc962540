"""The first stage of a request: its prompts are tokenized, fair between requests, on few threads and within bounds.

Short requests are tokenized on the event loop. Longer ones are cut into pieces (pieces.py), and free threads take the
pieces of all requests by turns. So no request waits until another is done, and what a request no longer wants is not
begun. A call that hangs costs a thread, and the request that made it its time.

Belongs to the event loop, except for the threads' calls of the tokenizer.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy

from encoder.errors import NotReady, QueueFull, RequestTooLarge
from encoder.presets.preset import Preset
from encoder.serving.deadline import Deadline
from encoder.serving.fair_queue import FairQueue
from encoder.serving.health import Health
from encoder.serving.pieces import Piece, Request, Tokenized, cut
from encoder.serving.rate import Rate
from encoder.serving.recent_tokens import MAX_BYTES, RecentTokens
from encoder.serving.tokenizer_thread import TokenizerThread, call_tokenizer
from encoder.text_encoder import TextEncoder
from encoder.types import TokenizedPrompt

# A request of so many characters, templates included, is tokenized on the event loop. That takes half a millisecond or
# less, not much more than the detour over another thread.
MAX_CHARS_ON_LOOP = 400
THREADS = max(2, min(4, (os.cpu_count() or 1) // 2))  # two at least, so that one that hangs leaves another
FIRST_RATE = 400_000.0  # characters per second and thread, assumed until some have been tokenized
ROOM_SHARE = 8  # a refused request is told to wait until this share of the stage is free, so that others find room too
STUCK_TICKS = 20  # of the guardian, 5 s: the longest prompt takes a hundredth of that


class Tokenizing:
    """Tokenizes the prompts of all requests.

    Args:
        max_chars: characters, templates included, that may wait or be tokenized at a time.
        health: hears of unexpected failures.
        threads: that call the tokenizer.
    """

    def __init__(self, max_chars: int, health: Health, threads: int = THREADS) -> None:
        self._health = health
        self._max_chars = max_chars
        self._recent = RecentTokens()
        self._queue: FairQueue[Piece] = FairQueue()
        self._chars = 0  # that wait or are tokenized
        self._requests: set[Request] = set()
        self._rate = Rate(FIRST_RATE * threads)
        self._num_threads = threads
        self._threads: list[TokenizerThread] = []
        self._idle: list[TokenizerThread] = []
        self._encoder: TextEncoder | None = None
        self._refusal: NotReady | None = None  # what requests get once this is closed

    def start(self, encoder: TextEncoder) -> None:
        """Tokenize as this model needs it. Call on the event loop."""
        self._encoder = encoder
        self._threads = [TokenizerThread(encoder, self._health, self._on_done) for _ in range(self._num_threads)]
        self._idle = list(self._threads)

    def close(self, error: NotReady) -> None:
        """Fail all that waits with this error, refuse what comes, and let the threads end."""
        self._refusal = self._refusal or error
        self._encoder = None  # its memory must be free to go
        self._fail_all(error)
        for thread in self._threads:
            thread.end()

    def tick(self) -> int:
        """Note that a tick of the guardian has passed. Returns how many there were since the oldest call began."""
        oldest = max((thread.stall.tick() for thread in self._threads), default=0)
        if self._is_stuck():
            self._fail_all(_stuck())
        return oldest

    def stats(self) -> dict[str, int]:
        """Gauges by the names of EngineStats."""
        return {"tokenizing_requests": len(self._requests), "tokenizing_chars": self._chars}

    async def tokenize(
        self, prompts: Sequence[str], preset: Preset, chars: Sequence[int], deadline: Deadline
    ) -> list[TokenizedPrompt]:
        """The tokens of a request's prompts. Cancelling it drops what has not begun.

        Args:
            prompts: of one request.
            preset: puts its template around them.
            chars: of each prompt with its template.
            deadline: of the request.
        Errors: InvalidField, RequestTooLarge, QueueFull, DeadlineExceeded; NotReady once closed, or where no thread
            answers; ModelFailure where the tokenizer raises.
        """
        if self._encoder is None:
            raise copy(self._refusal or NotReady("The model is still loading.", 5))
        total = sum(chars)
        tokenized = self._recent.get(prompts, preset) if total <= MAX_BYTES else None
        if tokenized is not None:
            return tokenized
        if total > MAX_CHARS_ON_LOOP:
            tokenized = await self._on_threads(prompts, preset, chars, deadline)
        else:
            tokenized = call_tokenizer(self._encoder, prompts, preset, self._health)
        self._recent.put(prompts, preset, tokenized)
        return tokenized

    async def _on_threads(
        self, prompts: Sequence[str], preset: Preset, chars: Sequence[int], deadline: Deadline
    ) -> list[TokenizedPrompt]:
        self._admit(sum(chars))
        loop = asyncio.get_running_loop()
        request = Request(preset, loop.create_future(), left=len(prompts))
        pieces = list(cut(request, prompts, chars))
        self._queue.put({piece: max(1, piece.chars) for piece in pieces})
        self._requests.add(request)
        self._chars += sum(chars)
        timer = loop.call_later(deadline.left_s(), lambda: request.fail(deadline.exceeded("tokenizing")))
        try:
            self._assign()
            await request.done
        finally:
            timer.cancel()
            self._requests.discard(request)
            for piece in pieces:
                if self._queue.discard(piece):
                    self._chars -= piece.chars
        return [prompt for piece in pieces for prompt in piece.tokenized]

    def _admit(self, chars: int) -> None:
        """Return if there is room for so many characters. Errors: NotReady, RequestTooLarge, QueueFull."""
        if self._is_stuck():
            raise _stuck()
        if chars > self._max_chars:
            raise RequestTooLarge(
                f"The request has {chars} characters, all that are tokenized at a time may have {self._max_chars}. "
                "Send fewer prompts at a time."
            )
        if self._chars + chars > self._max_chars:
            wanted = max(chars, self._max_chars // ROOM_SHARE)
            retry_after_s = self._rate.retry_after_s(self._chars + wanted - self._max_chars)
            raise QueueFull(
                f"{self._chars} of {self._max_chars} characters wait to be tokenized, this request adds {chars}. "
                f"Retry in {retry_after_s} s.",
                retry_after_s,
            )

    def _assign(self) -> None:
        """Give each free thread the piece whose turn it is."""
        with self._error_boundary():
            while self._idle and len(self._queue):
                [piece] = self._queue.first(1)
                self._queue.take([piece])
                self._idle.pop().begin(piece)

    def _on_done(self, thread: TokenizerThread, piece: Piece, outcome: Tokenized, seconds: float) -> None:
        with self._error_boundary():
            self._chars -= piece.chars
            self._idle.append(thread)
            piece.request.accept(piece, outcome)
            self._rate.measure(piece.chars * self._num_threads, seconds)
        self._assign()

    @contextmanager
    def _error_boundary(self) -> Iterator[None]:
        """Contain an unexpected exception. A piece or a thread may be lost by it, so all of this must be replaced."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001  # whatever it is, requests would wait in vain
            self._health.report_broken("Prompts could not be given to the tokenizer, or taken from it.", error)

    def _is_stuck(self) -> bool:
        """Whether every thread is in a call that does not return."""
        return not self._idle and all(thread.stall.ticks >= STUCK_TICKS for thread in self._threads)

    def _fail_all(self, error: NotReady) -> None:
        for request in list(self._requests):
            request.fail(copy(error))


def _stuck() -> NotReady:
    return NotReady("No thread of the tokenizer answers.", 60)
