"""Small tokenizer.json files that describe work without end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encoder import ModelFailure
from encoder.checkpoint.files.tokenizer_files import open_tokenizer
from encoder.checkpoint.files.tokenizer_limits import MAX_TEXT_BYTES
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer
from tests.checkpoints import write_checkpoint, write_json

Change = Callable[[dict[str, Any]], dict[str, Any]]
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def opened(folder: Path, change: Change) -> Tokenizer:
    """The demo's tokenizer, changed, and of a class whose files are taken as they are."""
    write_checkpoint(folder)
    stored = json.loads((folder / "tokenizer.json").read_bytes())
    write_json(folder / "tokenizer.json", stored | change(stored))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return open_tokenizer(folder)


def replace(pattern: dict[str, str], content: str, times: int = 1) -> Change:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return lambda stored: {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


def add(text: str) -> Change:
    return lambda stored: {"added_tokens": [*stored["added_tokens"], {"id": 999, "content": text, **ADDED}]}


def template(count: int, ids: int) -> Change:
    token, text = {"SpecialToken": {"id": "q", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"q": {"id": "q", "ids": [1] * ids, "tokens": ["q"] * ids}}
    processor = {"type": "TemplateProcessing", "single": [token] * count + [text], "pair": [text, text]}
    return lambda stored: {"post_processor": processor | {"special_tokens": tokens}}


def nested(times: int) -> Change:
    step = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    return lambda stored: {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(replace({"String": "a"}, "aaaaaaaaaa", 9), "1,000,000,000 times as long", id="growth"),
        pytest.param(replace({"Regex": "a*"}, "a" * 17), "17 times as long", id="growth by a pattern"),
        pytest.param(replace({"String": ""}, "a" * 17), "17 times as long", id="growth of nothing"),
        pytest.param(nested(33), "33 steps of one kind", id="steps"),
        pytest.param(add('\\"' * MAX_TEXT_BYTES), f"a text of {4 * MAX_TEXT_BYTES:,} bytes", id="long token"),
        pytest.param(template(40, 30), "adds 1,200 tokens to every text", id="template"),
    ],
)
def test_a_tokenizer_that_blows_up_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, change)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(replace({"String": " "}, "\u2581"), id="blank"),
        pytest.param(replace({"String": "ab"}, "a" * 32), id="growth"),
        pytest.param(nested(32), id="steps"),
        pytest.param(add('\\"' * 500), id="token"),
        pytest.param(template(30, 30), id="template"),
    ],
)
def test_a_tokenizer_within_the_limits_is_opened(tmp_path: Path, change: Change) -> None:
    assert opened(tmp_path, change).tokenize("a cat", max_length=2000)[0]


def test_a_declared_token_is_short(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"extra_special_tokens": ["x" * 1001]})

    with pytest.raises(CheckpointError, match="one has 1,001 characters, expected at most 1,000"):
        open_tokenizer(tmp_path)


def test_a_library_that_panics_fails_the_request_and_does_not_repeat_the_prompt(tmp_path: Path) -> None:
    """A panic is no Exception, so nothing on its way would have answered the request."""
    pattern = {"Regex": "(a|aa|a+)+$"}  # the library gives up after ten million steps
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tokenizer = opened(
        tmp_path,
        lambda stored: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, stored["pre_tokenizer"]]}},
    )

    with pytest.raises(ModelFailure) as caught:
        tokenizer.tokenize("a" * 30 + "!", max_length=64)
    assert "aaa" not in str(caught.value)
    assert caught.value.__suppress_context__
