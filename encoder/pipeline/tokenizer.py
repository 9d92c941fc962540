"""Prompt to token ids: the template around the prompt, the tokenizer, truncation.

Knows nothing of padding, see plan.py. No call changes the state, so one tokenizer serves all threads.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from encoder.errors import CheckpointError, EncoderError, InvalidField, ModelFailure
from encoder.presets.preset import Preset
from encoder.types import TokenizedPrompt

CACHED_WORDS = 1000  # of which the library keeps the tokens; by default ten times as many per thread, up to 4.5 MB


class Tokenizer:
    """A checkpoint's tokenizer, giving the ids that transformers gives.

    Args:
        tokenizer: the library's. It gets no other user.
        pad_token, source: as the attributes.
    Attributes:
        vocab_size: ids are below this.
        pad_token: the padding token that the checkpoint names, None where it names none. Presets have their own.
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
        self.pad_token = pad_token

    @property
    def splits_special_tokens(self) -> bool:
        """Whether special tokens in a text are read as ordinary text."""
        return bool(self._tokenizer.encode_special_tokens)

    def save(self, file: Path) -> None:
        """Write it as a tokenizer.json. Errors: OSError."""
        file.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, None where there is none."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def has_token(self, token: str) -> bool:
        """Whether the vocabulary or the added tokens have it."""
        return self.token_id(token) is not None

    def tokenize(
        self, text: str, *, max_length: int, add_special_tokens: bool = True, closing_token: str | None = None
    ) -> tuple[tuple[int, ...], bool]:
        """The ids of `text`, and whether it was cut.

        Text that is too long loses its end, but not the tokens that are added around it.

        Args:
            text: the whole string, template included: tokens can span the edge between template and prompt.
            max_length: in tokens, including those that are added.
            add_special_tokens, closing_token: what is added, as in `Preset`.
        Errors: InvalidField when the text is no valid Unicode, max_length leaves no room for the text, or there is no
            such closing token.
        Source: transformers, TokenizersBackend._encode_plus with truncation=True.
        """
        before, after = self._around(add_special_tokens, closing_token)
        room = max_length - len(before) - len(after)
        if room < 0:
            raise InvalidField(
                "max_sequence_length",
                f"{max_length} is less than the {len(before) + len(after)} tokens that are added to every text.",
            )
        ids = self._encode(text)
        return (*before, *ids[:room], *after), len(ids) > room

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's spelling of each id, as in tokenizer.json: a byte-level BPE writes a blank as `Ġ`."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in ids]

    def _around(self, add_special_tokens: bool, closing_token: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and after every text."""
        if closing_token is None:
            return (self._before, self._after) if add_special_tokens else ((), ())
        if not closing_token:
            return (), ()
        token_id = self.token_id(closing_token)
        if token_id is None:
            raise InvalidField("closing_token", f"{closing_token!r} is no token of the checkpoint's tokenizer.")
        return (), (token_id,)

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidField(
                "prompts", f"character {error.start} is half of a surrogate pair, expected valid Unicode text."
            ) from error
        with _panics_as(ModelFailure("The checkpoint's tokenizer failed on this text. Try other words.")):
            # Unlike the library's other methods, this one releases the GIL and computes no offsets.
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids


@contextmanager
def _panics_as(error: EncoderError) -> Iterator[None]:
    """Raise `error` where the library panics, which is no Exception, and may say words of the text."""
    try:
        yield
    except BaseException as caught:
        if type(caught).__name__ != "PanicException":
            raise
        raise error from None


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
    is_blank = not prompt or prompt.isspace()  # `strip` would copy it
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
        text,
        max_length=window - len(tail),
        add_special_tokens=preset.add_special_tokens,
        closing_token=preset.closing_token,
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
    with _panics_as(CheckpointError("tokenizer.json: fails on the letter 'a'. Is this a Qwen3 tokenizer?")):
        encoding = tokenizer.encode("a", add_special_tokens=True)
    own = [position for position, special in enumerate(encoding.special_tokens_mask) if not special]
    if not own:
        raise CheckpointError("tokenizer.json: the letter 'a' has no token. Is this a Qwen3 tokenizer?")
    return tuple(encoding.ids[: own[0]]), tuple(encoding.ids[own[-1] + 1 :])
