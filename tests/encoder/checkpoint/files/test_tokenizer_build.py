"""Tokenizers from the files of a folder. tests/parity/test_tokenizers.py compares many more with transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encoder.checkpoint.files.tokenizer_files import open_named_tokenizer, open_tokenizer
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer
from tests.checkpoints import write_json, write_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 11422654\n" % (b"0" * 64)
FIRST_FREE = 282  # the demo's tokenizer has the ids below
LOC = {"content": "<loc>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def settings(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return read


def change(folder: Path, **fields: Any) -> None:
    """Replace fields of tokenizer_config.json; None leaves one out."""
    changed = settings(folder) | fields
    write_json(folder / "tokenizer_config.json", {name: value for name, value in changed.items() if value is not None})


def make_slow(folder: Path) -> None:
    """Write the same tokenizer as vocab.json and merges.txt."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    write_json(folder / "vocab.json", stored["model"]["vocab"])
    (folder / "merges.txt").write_text("#version: 0.2\n")


def ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tokenizer.tokenize(text, max_length=100)[0]


def in_the_decoder(folder: Path) -> None:
    change(folder, added_tokens_decoder=settings(folder)["added_tokens_decoder"] | {str(FIRST_FREE): LOC})


def in_added_tokens_json(folder: Path) -> None:
    change(folder, added_tokens_decoder=None)
    write_json(folder / "added_tokens.json", {"<loc>": FIRST_FREE})


def in_special_tokens_map(folder: Path) -> None:
    change(folder, added_tokens_decoder=None, additional_special_tokens=None)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": ["<loc>"]})


@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize(
    "declare",
    [
        pytest.param(in_the_decoder, id="added_tokens_decoder"),
        pytest.param(lambda folder: change(folder, additional_special_tokens=["<loc>"]), id="additional"),
        pytest.param(lambda folder: change(folder, extra_special_tokens=["<loc>"]), id="extra-list"),
        pytest.param(lambda folder: change(folder, extra_special_tokens={"loc": "<loc>"}), id="extra-dict"),
        pytest.param(lambda folder: change(folder, loc_token="<loc>"), id="own-name"),
        pytest.param(lambda folder: change(folder, pad_token="<loc>"), id="pad"),
        pytest.param(in_added_tokens_json, id="added_tokens.json"),
        pytest.param(in_special_tokens_map, id="special_tokens_map.json"),
    ],
)
def test_a_token_declared_outside_tokenizer_json_is_one_token(
    folder: Path, declare: Callable[[Path], None], tokenizer_class: str | None
) -> None:
    """Else its text would be read letter by letter."""
    change(folder, tokenizer_class=tokenizer_class)
    declare(folder)
    tokenizer = open_tokenizer(folder)

    assert ids(tokenizer, "<loc><|im_end|>") == (FIRST_FREE, 258)
    assert tokenizer.vocab_size == FIRST_FREE + 1


def test_flags_of_a_declared_token_count(folder: Path) -> None:
    """It takes the blanks on its left."""
    declared = settings(folder)["added_tokens_decoder"]
    change(folder, added_tokens_decoder=declared | {str(FIRST_FREE): LOC | {"lstrip": True}})
    tokenizer = open_tokenizer(folder)

    assert ids(tokenizer, "a   <loc> ") == (*ids(tokenizer, "a"), FIRST_FREE, *ids(tokenizer, " "))


def test_a_named_file_takes_the_settings_beside_it(folder: Path) -> None:
    """--tokenizer may name a file of any name."""
    change(folder, extra_special_tokens=["<loc>"])
    file = (folder / "tokenizer.json").rename(folder / "mine.json")

    assert ids(open_named_tokenizer(str(file), None), "<loc>") == (FIRST_FREE,)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_file_of_a_slow_tokenizer_stands_for_its_folder(folder: Path, name: str) -> None:
    make_slow(folder)

    assert ids(open_named_tokenizer(str(folder / name), None), "<|im_end|>") == (258,)


def test_a_slow_tokenizers_files_give_the_same_tokens(folder: Path) -> None:
    fast = open_tokenizer(folder)
    make_slow(folder)
    slow = open_tokenizer(folder)

    for text in ("", "a cat", "<|im_start|>user\n雪<|im_end|>", "  <think> x", "cafe\u0301"):
        assert ids(slow, text) == ids(fast, text)
    assert slow.vocab_size == fast.vocab_size


def test_a_slow_tokenizers_files_may_come_from_windows(tmp_path: Path) -> None:
    """With byte order marks, and in a folder whose name is no UTF-8."""
    folder = tmp_path / "mod\udce8le"
    write_tokenizer(folder)
    make_slow(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"ab": 256}), encoding="utf-8-sig")
    (folder / "merges.txt").write_text("#version: 0.2\r\na b\r\n", encoding="utf-8-sig", newline="")

    assert ids(open_tokenizer(folder), "ab<|im_end|>") == (256, 259)


@pytest.mark.parametrize(("slow", "expected"), [(True, (258,)), (False, ())])
def test_add_eos_token_counts_for_a_slow_tokenizer_alone(folder: Path, slow: bool, expected: tuple[int, ...]) -> None:
    """As in transformers 5: a tokenizer.json says itself what is added."""
    change(folder, add_eos_token=True)
    if slow:
        make_slow(folder)

    assert ids(open_tokenizer(folder), "") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(POINTER, "is a Git LFS pointer, which only names", id="pointer"),
        pytest.param(b"<!doctype html><html><body>Please log in", "is a web page, not the file", id="page"),
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b" \n", "and may be cut off: .*EOF", id="blank"),
        pytest.param(b'{"version": "1.0", "model": {"vocab": {"a": 0', "and may be cut off: .*EOF", id="cut-off"),
        pytest.param(b"[]", "cannot be read as a tokenizer", id="no-object"),
        pytest.param(b"\xff\xfe{\x00", "cannot be read as a tokenizer", id="no-utf-8"),
    ],
)
def test_what_lies_in_the_place_of_tokenizer_json_is_named(folder: Path, content: bytes, message: str) -> None:
    """One line that names the file, what it is, and what to do."""
    (folder / "tokenizer.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=message) as raised:
        open_tokenizer(folder)
    assert str(raised.value).startswith(f"{folder / 'tokenizer.json'}: ")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_panic_of_the_library_is_an_error_like_another(folder: Path) -> None:
    """It is no Exception, and would end the process."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["merges"] = [["\u0120", "a"]]  # they make no token, and more bytes than any token has
    write_json(folder / "tokenizer.json", stored)

    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read as a tokenizer"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"added_tokens_decoder": {"x": LOC}},
        {"added_tokens_decoder": {"282": "<loc>", "283": 7}},
        {"added_tokens_decoder": {"282": LOC | {"lstrip": "yes"}}},
        {"added_tokens_decoder": [LOC]},
        {"extra_special_tokens": [[]]},
        {"extra_special_tokens": 7},
        {"extra_special_tokens": {"loc": 7}},
        {"pad_token": {"text": "<loc>"}},
        {"eos_token": 7},
        {"model_specific_special_tokens": ["<loc>"]},
        {"extra_special_tokens": [f"<x{number}>" for number in range(140_000)]},
    ],
)
def test_settings_that_declare_no_tokens_are_refused_in_one_line(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, **fields)

    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: .*tokens") as raised:
        open_tokenizer(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "vocab.json and .*merges.txt: cannot be read"),
        ("merges.txt", POINTER.decode(), "merges.txt: is a Git LFS pointer"),
        ("vocab.json", "", "vocab.json: is empty"),
        ("merges.txt", "a b\n", "merges.txt: cannot be read .*the merge 'a b' needs 'ab', which is no token"),
        ("merges.txt", "a b c d\n", "vocab.json and .*merges.txt: cannot be read"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "BertTokenizer"}',
            "tokenizer_class is 'BertTokenizer', expected",
        ),
    ],
)
def test_a_damaged_slow_tokenizer_is_named(folder: Path, name: str, content: str, message: str) -> None:
    make_slow(folder)
    (folder / name).write_text(content)

    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(folder)
