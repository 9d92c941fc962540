"""Prompt to token ids: the template around the prompt, the tokenizer, truncation.

Knows nothing of padding, see plan.py. No call changes the state, so one tokenizer serves all threads.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from encoder.errors import CheckpointError, InvalidField
from encoder.presets.preset import Preset
from encoder.types import TokenizedPrompt

_DEFAULT_PAD_TOKEN = "<|endoftext|>"
CACHED_WORDS = 1000  # of which the library keeps the tokens; by default ten times as many per thread, up to 4.5 MB


class Tokenizer:
    """A checkpoint's tokenizer.json, giving the ids that transformers gives.

    Attributes:
        vocab_size: ids are below this.
        pad_token_id: what fills padding rows that the model reads.
        pad_token: its text.
        source: where it came from, for people.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, pad_token: str | None = None, source: str = "") -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if resize_cache := getattr(tokenizer.model, "_resize_cache", None):  # a BPE
            resize_cache(CACHED_WORDS)
        self._tokenizer = tokenizer
        self.source = source
        self._before, self._after = _added_ids(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.pad_token_id = _pad_token_id(tokenizer, pad_token)
        self.pad_token = str(tokenizer.id_to_token(self.pad_token_id))

    @classmethod
    def from_file(cls, file: Path, pad_token: str | None = None) -> "Tokenizer":
        """The tokenizer in a tokenizer.json.

        Args:
            file: to read.
            pad_token: as tokenizer_config.json names it; where it is None or unknown, `<|endoftext|>` pads.
        Errors: CheckpointError when the file is damaged, or has no padding token.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file}: cannot be read as a tokenizer: {error}") from error
        return cls(tokenizer, pad_token, str(file))

    def save(self, file: Path) -> None:
        """Write it as a tokenizer.json."""
        self._tokenizer.save(str(file))

    def tokenize(self, text: str, *, max_length: int, add_special_tokens: bool = True) -> tuple[tuple[int, ...], bool]:
        """The ids of `text`, and whether it was cut.

        Text that is too long loses its end, but not the tokens that the post-processor adds around it.

        Args:
            text: the whole string, template included: tokens can span the edge between template and prompt.
            max_length: in tokens, including those that the post-processor adds.
            add_special_tokens: whether the post-processor runs; plain Qwen3's adds no token.
        Errors: InvalidField when the text is no valid Unicode, or max_length leaves no room for the text.
        Source: transformers, PreTrainedTokenizerFast._encode_plus with truncation=True.
        """
        before, after = (self._before, self._after) if add_special_tokens else ((), ())
        room = max_length - len(before) - len(after)
        if room < 0:
            raise InvalidField(
                "max_sequence_length",
                f"{max_length} is less than the {len(before) + len(after)} tokens that the tokenizer itself adds.",
            )
        ids = self._encode(text)
        return (*before, *ids[:room], *after), len(ids) > room

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's spelling of each id, as in tokenizer.json: a byte-level BPE writes a blank as `Ġ`."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in ids]

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidField(
                "prompts", f"character {error.start} is half of a surrogate pair, expected valid Unicode text."
            ) from error
        # Unlike the library's other methods, this one releases the GIL and computes no offsets.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
    """Put the preset's template around each prompt, and tokenize the result.

    Errors: InvalidField as in `Tokenizer.tokenize`, and for a prompt beyond the window where the preset refuses that.
    """
    return [_tokenize_one(tokenizer, prompt, preset) for prompt in prompts]


def count_chars(prompt: str, preset: Preset) -> int:
    """Characters of a prompt together with its template: all that is tokenized."""
    return sum(map(len, (*_template(prompt, preset), preset.tail)))


def _template(prompt: str, preset: Preset) -> tuple[str, str, str]:
    """The prefix, the prompt and the suffix that are tokenized as one string."""
    is_blank = not prompt.strip()
    prefix = preset.empty_prefix if is_blank and preset.empty_prefix is not None else preset.prefix
    return prefix, prompt or preset.empty_prompt, preset.suffix


def _tokenize_one(tokenizer: Tokenizer, prompt: str, preset: Preset) -> TokenizedPrompt:
    if preset.overlong == "cut_prompt":
        return _tokenize_apart(tokenizer, prompt, preset)
    text = "".join(_template(prompt, preset))
    window = preset.max_sequence_length
    tail: tuple[int, ...] = ()
    if preset.tail:
        tail, _ = tokenizer.tokenize(preset.tail, max_length=len(preset.tail), add_special_tokens=False)
    if window <= max(len(tail), preset.dropped_rows):
        raise InvalidField("max_sequence_length", f"{window} leaves no row of the prompt of {preset.name}.")
    input_ids, truncated = tokenizer.tokenize(
        text, max_length=window - len(tail), add_special_tokens=preset.add_special_tokens
    )
    if truncated and preset.overlong == "refused":
        raise InvalidField("prompts", f"one has more than {window} tokens, which {preset.name} refuses. Shorten it.")
    return TokenizedPrompt(text + preset.tail, input_ids + tail, truncated, len(tail))


def _tokenize_apart(tokenizer: Tokenizer, prompt: str, preset: Preset) -> TokenizedPrompt:
    """The prompt and the parts of the template tokenized one by one, and the prompt alone cut."""
    parts = (*_template(prompt, preset), preset.tail)
    prefix, text, suffix, tail = (
        tokenizer.tokenize(part, max_length=sys.maxsize, add_special_tokens=False)[0] for part in parts
    )
    room = preset.max_sequence_length - len(prefix) - len(suffix) - len(tail)
    if room < 1 or preset.max_sequence_length <= preset.dropped_rows:
        raise InvalidField(
            "max_sequence_length", f"{preset.max_sequence_length} leaves no token of the prompt of {preset.name}."
        )
    input_ids = (*prefix, *text[:room], *suffix, *tail)
    return TokenizedPrompt("".join(parts), input_ids, len(text) > room, len(tail))


def _added_ids(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after any text, read off the letter a."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [position for position, special in enumerate(encoding.special_tokens_mask) if not special]
    if not own:
        raise CheckpointError("tokenizer.json: the letter 'a' has no token. Is this a Qwen3 tokenizer?")
    return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])


def _pad_token_id(tokenizer: tokenizers.Tokenizer, pad_token: str | None) -> int:
    for token in (pad_token, _DEFAULT_PAD_TOKEN):
        token_id = None if token is None else tokenizer.token_to_id(token)
        if token_id is not None:
            return token_id
    raise CheckpointError(
        f"tokenizer_config.json: pad_token is {pad_token!r}, which tokenizer.json does not have, nor does it have "
        f"{_DEFAULT_PAD_TOKEN}. Name a padding token there."
    )
