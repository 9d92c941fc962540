"""The tokens of the latest requests: what is asked for again needs no tokenizer, and no way to its thread and back.

Templates are part of a preset, so a preset and its prompts decide the tokens.
"""

from collections import OrderedDict
from collections.abc import Sequence

from encoder.presets.preset import Preset
from encoder.serving.cache.memory import TOKEN_BYTES
from encoder.types import TokenizedPrompt

MAX_REQUESTS = 256
MAX_BYTES = 2**16  # of a request: some 1500 tokens; beside longer ones, tokenizing is no longer what takes the time


class RecentTokens:
    """Tokenized prompts by request, least recently asked for out first; some 20 MB at most."""

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
