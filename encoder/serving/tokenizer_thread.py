"""A thread that calls the tokenizer, and what happens when a call raises."""

import asyncio
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread

from encoder.errors import EncoderError, ModelFailure
from encoder.presets.preset import Preset
from encoder.serving.health import Health
from encoder.serving.pieces import Piece, Tokenized
from encoder.serving.pulse import Pulse, StallCount
from encoder.text_encoder import TextEncoder
from encoder.types import TokenizedPrompt

OnDone = Callable[["TokenizerThread", Piece, Tokenized, float], None]


class TokenizerThread:
    """A thread that tokenizes one piece after the other. A daemon, so that a call that hangs keeps no process alive.

    Args:
        encoder: whose tokenizer is called.
        health: hears of unexpected failures.
        on_done: called on the event loop with this thread, the piece, its outcome, and the seconds that it took.
    Attributes:
        stall: ticks since the call that runs began.
    """

    def __init__(self, encoder: TextEncoder, health: Health, on_done: OnDone) -> None:
        self._health = health
        self._on_done = on_done
        self._loop = asyncio.get_running_loop()
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._pulse = Pulse()
        self.stall = StallCount(self._pulse)
        Thread(target=self._run, args=[encoder], name="tokenizer", daemon=True).start()

    def begin(self, piece: Piece) -> None:
        """Tokenize a piece, after those that were given before."""
        self._pulse.begin("tokenize")
        self._pieces.put(piece)

    def end(self) -> None:
        """End after the pieces that were given."""
        self._pieces.put(None)

    def _run(self, encoder: TextEncoder) -> None:
        try:
            while (piece := self._pieces.get()) is not None:
                self._tokenize(encoder, piece)
        except BaseException as error:  # noqa: BLE001  # whatever it is, requests would wait for this thread in vain
            if not self._loop.is_closed():  # which it is where a call has outlived the engine
                self._health.report_broken("A thread of the tokenizer ended.", error)

    def _tokenize(self, encoder: TextEncoder, piece: Piece) -> None:
        started_at = time.perf_counter()
        try:
            outcome: Tokenized = call_tokenizer(encoder, piece.prompts, piece.request.preset, self._health)
        except EncoderError as error:
            outcome = error
        seconds = time.perf_counter() - started_at
        self._pulse.rest()
        self._loop.call_soon_threadsafe(self._on_done, self, piece, outcome, seconds)


def call_tokenizer(
    encoder: TextEncoder, prompts: Sequence[str], preset: Preset, health: Health
) -> list[TokenizedPrompt]:
    """The tokens of some prompts. Errors: InvalidField; ModelFailure for whatever else the tokenizer raises."""
    try:
        return encoder.tokenize(prompts, preset)
    except EncoderError:
        raise
    except BaseException as error:  # a panic of the library is no Exception
        health.report("The tokenizer failed.", error)
        raise ModelFailure(f"The tokenizer failed: {error!r}. The log has the details.") from error
