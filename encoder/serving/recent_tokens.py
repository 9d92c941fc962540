"""The tokens of the latest requests, so that a repeated request needs no tokenizer and no other thread.

Templates are part of a preset, so the preset and the prompts determine the tokens.
"""

from collections import OrderedDict
from collections.abc import Sequence

from encoder.presets.preset import Preset
from encoder.serving.cache.memory import TOKEN_BYTES
from encoder.types import TokenizedPrompt

MAX_REQUESTS = 256
MAX_BYTES = 2**16  # of a request, some 1500 tokens; for longer ones, tokenizing is a small part of the time


class RecentTokens:
    """Tokenized prompts by request, an LRU cache of some 20 MB at most."""

    def __init__(self) -> None:
        self._requests: OrderedDict[tuple[Preset, tuple[str, ...]], list[TokenizedPrompt]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt] | None:
        """The tokens of an equal request, or None."""
        key = (preset, tuple(prompts))
        tokenized = self._requests.get(key)
        if tokenized is not None:
            self._requests.move_to_end(key)
        return tokenized

    def put(self, prompts: Sequence[str], preset: Preset, tokenized: list[TokenizedPrompt]) -> None:
        """Keep the tokens of a request, unless it is long."""
        if sum(len(prompt.text) + TOKEN_BYTES * len(prompt.input_ids) for prompt in tokenized) > MAX_BYTES:
            return
        self._requests[preset, tuple(prompts)] = tokenized
        if len(self._requests) > MAX_REQUESTS:
            self._requests.popitem(last=False)
