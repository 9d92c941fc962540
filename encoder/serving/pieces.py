"""Requests that are tokenized, and the pieces that they are cut into. Data, no threads."""

from asyncio import Future
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from encoder.errors import EncoderError
from encoder.presets.preset import Preset
from encoder.types import TokenizedPrompt

PIECE_CHARS = 8000  # some ten milliseconds
Tokenized = list[TokenizedPrompt] | EncoderError


@dataclass(eq=False, slots=True)
class Request:
    """What of a request is still missing.

    Attributes:
        preset: of all its prompts.
        done: resolved when every prompt has been tokenized, or one failed.
        left: prompts that have not been tokenized.
    """

    preset: Preset
    done: "Future[None]"
    left: int

    def accept(self, piece: "Piece", outcome: Tokenized) -> None:
        """Take the outcome of a piece. What comes after the request has ended is of no use."""
        if isinstance(outcome, EncoderError):
            self.fail(outcome)
            return
        piece.tokenized = outcome
        self.left -= len(piece.prompts)
        if self.left == 0 and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: EncoderError) -> None:
        """End the request with an error, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(eq=False, slots=True)
class Piece:
    """Some prompts of a request that are tokenized by one call."""

    request: Request
    prompts: Sequence[str]
    chars: int
    tokenized: list[TokenizedPrompt] = field(default_factory=list)


def cut(request: Request, prompts: Sequence[str], chars: Sequence[int]) -> Iterator[Piece]:
    """The prompts in pieces, each of as many whole prompts as PIECE_CHARS have room for, or of one."""
    begin = size = 0
    for end, count in enumerate(chars):
        if end > begin and size + count > PIECE_CHARS:
            yield Piece(request, prompts[begin:end], size)
            begin, size = end, 0
        size += count
    yield Piece(request, prompts[begin:], size)
