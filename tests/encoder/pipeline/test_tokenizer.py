"""Prompt to ids, with the demo's tokenizer, whose ids follow from the bytes, and with a small one that has merges."""

import json
import resource
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.files.demo_tokenizer import tokenizer_json
from encoder.errors import InvalidField
from encoder.options import ModelOptions
from encoder.pipeline.tokenizer import Tokenizer, tokenize
from encoder.presets.built_in import FLUX2_KLEIN, Z_IMAGE, get_preset
from encoder.presets.preset import Preset

ENDOFTEXT, IM_START, IM_END = 256, 257, 258
WORDS = Regex(
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # Qwen3's, shortened
# Pages of memory taken by twenty thousand words that nobody has said before.
NEW_WORDS = """
import itertools, pathlib, sys, tokenizers
from encoder.pipeline.tokenizer import Tokenizer
tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(sys.argv[1]))
words = map("".join, itertools.product("abcdefghijklmnopqrst", repeat=4))
def pages_after(count):
    for word in itertools.islice(words, count):
        tokenizer.tokenize("strange" + word, max_length=512)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])
print(-pages_after(2_000) + pages_after(20_000))
"""
CORPUS = ["user\n\n\na photo of a cat, a photo of a dog\n\n", "assistant\n<think>\n\n</think>\n\n a cat's hat"] * 3

TEXTS = [
    pytest.param("", id="empty"),
    pytest.param("a photo of a cat", id="ascii"),
    pytest.param("\n\n leading and trailing \n", id="newlines"),
    pytest.param("雪中的红狐狸", id="chinese"),
    pytest.param("👩‍👩‍👧 🦊", id="emoji"),
    pytest.param("cafe\u0301 \u1100\u1161 \u212b", id="not-nfc"),
    pytest.param("a\x00b\u200d\ufffd", id="odd-characters"),
    pytest.param("<|im_start|>user\nhi<|im_end|>", id="special-tokens-typed-in"),
    pytest.param("<think></think><|unknown|><|im_start", id="half-a-special-token"),
    pytest.param("word " * 200, id="long"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json())))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the demo's tokenizer.json with some of its fields replaced."""

    def write(**fields: Any) -> Path:
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(tokenizer_json() | fields))
        return file

    return write


def read(file: Path) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))


def ending(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that adds one token at the end, as Qwen3-Embedding's does."""
    return {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def with_merges() -> tokenizers.Tokenizer:
    """A byte-level BPE built as Qwen3's, with merges learnt from a few lines."""
    built = tokenizers.Tokenizer(models.BPE())
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    built.train_from_iterator(CORPUS, trainer)
    built.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    built.add_tokens(["<think>", "</think>"])
    return built


def byte_ids(text: str) -> tuple[int, ...]:
    """The demo's ids of a text without special tokens."""
    vocabulary = tokenizer_json()["model"]["vocab"]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    return tuple(vocabulary[character] for word, _ in spell(text) for character in word)


@pytest.mark.parametrize("text", [text for text in TEXTS if "special" not in str(text.id)])
def test_demo_ids_are_the_bytes_of_the_composed_text(tokenizer: Tokenizer, text: str) -> None:
    """NFC comes before the bytes, as in Qwen3."""
    ids, truncated = tokenizer.tokenize(text, max_length=2000)

    assert ids == byte_ids(unicodedata.normalize("NFC", text))
    assert not truncated


def test_special_tokens_typed_into_a_prompt_are_parsed(tokenizer: Tokenizer) -> None:
    """Every reference pipeline parses them, so a prompt means the same here."""
    ids, _ = tokenizer.tokenize("<|im_start|>hi<|im_end|><|endoftext|>", max_length=100)

    assert ids == (IM_START, *byte_ids("hi"), IM_END, ENDOFTEXT)


def test_text_that_is_too_long_loses_its_end(tokenizer: Tokenizer) -> None:
    """Qwen3 truncates on the right."""
    ids, truncated = tokenizer.tokenize("abcdef", max_length=4)

    assert ids == byte_ids("abcd")
    assert truncated


def test_text_that_just_fits_is_not_truncated(tokenizer: Tokenizer) -> None:
    """The window counts tokens, the last one included."""
    assert tokenizer.tokenize("abcd", max_length=4) == (byte_ids("abcd"), False)


def test_truncation_keeps_the_tokens_of_the_post_processor(write: Callable[..., Path]) -> None:
    """Qwen3-Embedding ends every text with <|endoftext|>, a cut one too."""
    tokenizer = read(write(post_processor=ending("<|endoftext|>", ENDOFTEXT)))

    assert tokenizer.tokenize("abc", max_length=4) == ((*byte_ids("abc"), ENDOFTEXT), False)
    assert tokenizer.tokenize("abcd", max_length=4) == ((*byte_ids("abc"), ENDOFTEXT), True)
    assert tokenizer.tokenize("", max_length=1) == ((ENDOFTEXT,), False)


def test_post_processor_can_be_left_out(write: Callable[..., Path]) -> None:
    """Some pipelines tokenize with add_special_tokens=False."""
    tokenizer = read(write(post_processor=ending("<|endoftext|>", ENDOFTEXT)))

    assert tokenizer.tokenize("abcd", max_length=4, add_special_tokens=False) == (byte_ids("abcd"), False)


def test_window_smaller_than_the_added_tokens_is_refused(write: Callable[..., Path]) -> None:
    """There is no right answer, so the caller hears about it."""
    tokenizer = read(write(post_processor=ending("<|endoftext|>", ENDOFTEXT)))

    with pytest.raises(InvalidField, match="max_sequence_length: 0 is less than the 1 tokens"):
        tokenizer.tokenize("a", max_length=0)


def test_truncation_and_padding_stored_in_the_file_are_switched_off(write: Callable[..., Path]) -> None:
    """Files saved after a training run often carry them; the window is the preset's."""
    file = write(
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 8},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    )

    assert read(file).tokenize("abcd", max_length=100) == (byte_ids("abcd"), False)


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    """JSON can carry it, UTF-8 cannot."""
    with pytest.raises(InvalidField, match="prompts: character 2 is half of a surrogate pair"):
        tokenizer.tokenize("ab\ud83d", max_length=10)


def test_template_and_prompt_are_tokenized_as_one_string() -> None:
    """Blanks merge across the template's edge: `user\\n` and a prompt that begins with a newline share a token."""
    tokenizer = Tokenizer(with_merges())
    [prompt] = tokenize(tokenizer, ["\n\na cat"], Z_IMAGE)
    joined = [tokenizer.tokenize(part, max_length=512)[0] for part in (Z_IMAGE.prefix, "\n\na cat", Z_IMAGE.suffix)]

    assert prompt.text == "<|im_start|>user\n\n\na cat<|im_end|>\n<|im_start|>assistant\n"
    assert "ĊĊĊ" in tokenizer.tokens(prompt.input_ids)
    assert len(prompt.input_ids) < sum(map(len, joined))


def test_prompts_take_template_and_window_of_the_preset(tokenizer: Tokenizer) -> None:
    """A cut prompt loses the end of the template, as in the reference."""
    preset = replace(FLUX2_KLEIN, max_sequence_length=10)
    short, long = tokenize(tokenizer, ["", "a long prompt"], replace(preset, suffix=""))

    assert short.input_ids == (IM_START, *byte_ids("user\n"))
    assert not short.truncated
    assert long.input_ids == (IM_START, *byte_ids("user\na lo"))
    assert long.truncated


def preset(**fields: Any) -> Preset:
    """One that adds nothing to a prompt but what the fields say."""
    return Preset(name="x", description="", source="", layers=(0,), **fields)


@pytest.mark.parametrize("template", [{"suffix": "!"}, {"tail": "!"}])
def test_a_prompt_that_is_too_long_is_refused_where_the_preset_says_so(
    tokenizer: Tokenizer, template: dict[str, Any]
) -> None:
    """Pipelines that never cut would give something else than a cut prompt does. The template counts."""
    refusing = preset(prefix="<|im_start|>", max_sequence_length=6, overlong="refused", **template)
    [fits] = tokenize(tokenizer, ["abcd"], refusing)

    assert len(fits.input_ids) == 6 and not fits.truncated
    with pytest.raises(InvalidField, match="prompts: one has more than 6 tokens, which x refuses"):
        tokenize(tokenizer, ["abcd", "abcde"], refusing)


@pytest.mark.parametrize(("tail", "end"), [("", ">"), ("!", ">!")])
def test_a_prompt_alone_may_be_cut(tokenizer: Tokenizer, tail: str, end: str) -> None:
    """Iris-3B keeps both ends of its template, which every prompt of its training had."""
    cutting = preset(prefix="<|im_start|>", suffix=">", tail=tail, max_sequence_length=6, overlong="cut_prompt")
    fits, long = tokenize(tokenizer, ["abcd"[: 5 - len(end)], "abcdef"], cutting)

    assert not fits.truncated and long.truncated
    assert fits.input_ids == long.input_ids == (IM_START, *byte_ids("abcd"[: 5 - len(end)] + end))
    assert fits.tail_tokens == len(tail)


def test_a_prompt_that_alone_is_cut_shares_no_token_with_its_template() -> None:
    """Its tokens are joined to those of the template, and a newline in front stays a token of its own."""
    tokenizer = Tokenizer(with_merges())
    [apart] = tokenize(tokenizer, ["\n"], preset(prefix="user\n", suffix="\n", overlong="cut_prompt"))
    [whole] = tokenize(tokenizer, ["\n"], preset(prefix="user\n", suffix="\n"))
    joined = [tokenizer.tokenize(part, max_length=8)[0] for part in ("user\n", "\n", "\n")]

    assert apart.input_ids == tuple(token for part in joined for token in part) != whole.input_ids
    assert apart.text == whole.text


def test_a_window_without_room_for_the_prompt_beside_its_template_is_refused(tokenizer: Tokenizer) -> None:
    """Nothing of the prompt would be left."""
    with pytest.raises(InvalidField, match="max_sequence_length: 2 leaves no token of the prompt of x"):
        tokenize(tokenizer, ["abc"], preset(prefix="<", suffix=">", max_sequence_length=2, overlong="cut_prompt"))


def test_an_empty_prompt_may_be_another_text(tokenizer: Tokenizer) -> None:
    """Qwen-Image-2.1 encodes a blank instead of nothing; a prompt of blanks is as it is."""
    empty, blanks = tokenize(tokenizer, ["", "  "], preset(prefix="<", suffix=">", empty_prompt=" "))

    assert (empty.text, blanks.text) == ("< >", "<  >")
    assert empty.input_ids == byte_ids("< >")


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "\u3000"])
def test_a_blank_prompt_may_have_another_prefix(tokenizer: Tokenizer, prompt: str) -> None:
    """Boogu; its suffix stays, and so do the blanks."""
    blank, other = tokenize(tokenizer, [prompt, f"{prompt}a"], preset(prefix="A:", empty_prefix="B:", suffix=";"))

    assert (blank.text, other.text) == (f"B:{prompt};", f"A:{prompt}a;")


def test_an_empty_prefix_may_be_no_prefix(tokenizer: Tokenizer) -> None:
    """ "" is a prefix like another, and not the same as None."""
    [blank] = tokenize(tokenizer, [""], preset(prefix="A:", empty_prefix="", suffix=";"))

    assert blank.text == ";"


def test_a_tail_is_tokenized_apart_and_never_cut() -> None:
    """Krea 2 tokenizes it by itself, so it shares no token with the prompt, and cuts the prompt before it."""
    tokenizer = Tokenizer(with_merges())
    with_tail = preset(prefix="user", tail="\n\n", max_sequence_length=8)
    short, long = tokenize(tokenizer, ["\n", "a photo of a cat, a photo of a dog"], with_tail)
    tail, _ = tokenizer.tokenize("\n\n", max_length=8)
    whole, _ = tokenizer.tokenize("user\n\n\n", max_length=8)

    assert short.text == "user\n\n\n"
    assert short.input_ids == tokenizer.tokenize("user\n", max_length=8)[0] + tail != whole
    assert short.tail_tokens == long.tail_tokens == len(tail)
    assert len(long.input_ids) == 8 and long.truncated
    assert long.input_ids[-len(tail) :] == tail


def test_a_tail_gets_no_token_of_the_post_processor(write: Callable[..., Path]) -> None:
    """One text has one end."""
    tokenizer = read(write(post_processor=ending("<|endoftext|>", ENDOFTEXT)))
    [prompt] = tokenize(tokenizer, ["a"], preset(tail="b"))

    assert prompt.input_ids == (*byte_ids("a"), ENDOFTEXT, *byte_ids("b"))


def test_threads_share_one_tokenizer(tokenizer: Tokenizer) -> None:
    """Requests are tokenized on many threads; each asks for its own window."""
    windows = list(range(1, 100)) * 5
    with ThreadPoolExecutor(8) as threads:
        lengths = threads.map(lambda window: len(tokenizer.tokenize("x" * 200, max_length=window)[0]), windows)

    assert list(lengths) == windows


def test_other_threads_run_while_a_long_text_is_tokenized(tokenizer: Tokenizer) -> None:
    """The event loop is one of them."""
    rounds = 0
    with ThreadPoolExecutor(1) as threads:
        tokenizing = threads.submit(tokenizer.tokenize, "a red fox " * 100_000, max_length=512)
        while not tokenizing.done():
            rounds += 1
            time.sleep(0.001)

    assert rounds > 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_new_words_do_not_fill_the_memory(write: Callable[..., Path]) -> None:
    """The library would keep ten thousand of them for each thread."""
    pages = subprocess.check_output([sys.executable, "-c", NEW_WORDS, str(write())], text=True)

    assert int(pages) * resource.getpagesize() < 2**20


def test_tokens_are_spelt_as_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    """So that they can be compared with what transformers prints."""
    ids, _ = tokenizer.tokenize("a ä<think>", max_length=10)

    assert tokenizer.tokens(ids) == ["a", "Ġ", "Ã", "¤", "<think>"]


def test_vocab_size_counts_the_added_tokens(tokenizer: Tokenizer) -> None:
    """Every id must have a row in embed_tokens."""
    assert tokenizer.vocab_size == 256 + 26


CLOSING = "<|endoftext|>"


@pytest.mark.parametrize("adds_itself", [True, False])
def test_a_presets_closing_token_ends_every_text_once(write: Callable[..., Path], adds_itself: bool) -> None:
    """ACE-Step's tokenizer appends it; that of plain Qwen3 with the same weights does not."""
    tokenizer = read(write(post_processor=ending(CLOSING, ENDOFTEXT)) if adds_itself else write())
    closing = preset(suffix="!", closing_token=CLOSING, max_sequence_length=4)
    short, long, written = tokenize(tokenizer, ["a", "abcdef", CLOSING], closing)

    assert short.input_ids == (*byte_ids("a!"), ENDOFTEXT)
    assert long.input_ids == (*byte_ids("abc"), ENDOFTEXT) and long.truncated
    assert written.input_ids == (ENDOFTEXT, *byte_ids("!"), ENDOFTEXT)


def test_a_preset_may_say_that_nothing_is_added(write: Callable[..., Path]) -> None:
    """Whatever tokenizer the weights come with."""
    tokenizer = read(write(post_processor=ending(CLOSING, ENDOFTEXT)))
    [own, none] = [tokenize(tokenizer, ["a"], preset(closing_token=closing))[0] for closing in (None, "")]

    assert own.input_ids == (*byte_ids("a"), ENDOFTEXT)
    assert none.input_ids == byte_ids("a")


def test_a_closing_token_that_does_not_exist_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidField, match=r"closing_token: '<eot>' is no token"):
        tokenize(tokenizer, ["a"], preset(closing_token="<eot>"))


@pytest.mark.parity
@pytest.mark.parametrize("adds_a_token", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(text: str, adds_a_token: bool) -> None:
    """With merges and a post-processor, at windows that cut and that do not."""
    transformers = pytest.importorskip("transformers")
    built = with_merges()
    endoftext = built.token_to_id("<|endoftext|>")
    if adds_a_token:
        built.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", endoftext)]
        )
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(built.to_str()), pad_token="<|endoftext|>"
    )
    tokenizer = Tokenizer(built)

    for window in (1, 2, 5, 17, 1000):
        for special in (True, False):
            expected = reference(text, truncation=True, max_length=window, add_special_tokens=special).input_ids
            ids, _ = tokenizer.tokenize(text, max_length=window, add_special_tokens=special)
            assert list(ids) == expected


@pytest.mark.parametrize(("name", "window"), [("krea-2", 34), ("qwen-image-2.1", 14)])
def test_a_window_that_leaves_no_row_is_refused(tmp_path: Path, name: str, window: int) -> None:
    """All rows of it would be dropped, or cut off behind the tail."""
    tokenizer = open_checkpoint(ModelOptions("demo", cache_dir=tmp_path)).tokenizer

    with pytest.raises(InvalidField, match=f"max_sequence_length: {window} leaves no row"):
        tokenize(tokenizer, ["a cat"], replace(get_preset(name), max_sequence_length=window))
