"""Which tokenizer weights without one get, and which tokenizers do not fit."""

import json
import logging
from pathlib import Path

import pytest

from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.files import tokenizer_files
from encoder.checkpoint.request import Request
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint, write_tokenizer


def test_qwen3s_tokenizer_is_for_models_with_all_of_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller vocabulary is another model's, whose tokens have other ids."""
    write_tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_files, "fetch_qwen3_tokenizer", lambda cache_dir: tmp_path)
    request = Request("model.safetensors", ModelOptions("model.safetensors"))

    assert tokenizer_files.find_tokenizer(request, [], 151_643).vocab_size == 282
    with pytest.raises(CheckpointError, match="Its vocabulary of 151,642 is not Qwen3's"):
        tokenizer_files.find_tokenizer(request, [], 151_642)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    """The embedding has no row for them; found at the start, not at the first prompt that has one."""
    write_checkpoint(tmp_path, vocab_size=281)

    with pytest.raises(CheckpointError, match=r"282 tokens, expected at most the 281 of the model's.*--tokenizer"):
        open_checkpoint(ModelOptions(str(tmp_path)))


@pytest.mark.parametrize("vocab_size", [282, 300])
def test_a_model_may_have_rows_that_no_token_uses(tmp_path: Path, vocab_size: int) -> None:
    write_checkpoint(tmp_path, vocab_size=vocab_size)

    assert open_checkpoint(ModelOptions(str(tmp_path))).tokenizer.vocab_size == 282


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_byte_order_mark_is_no_damage(tmp_path: Path, name: str) -> None:
    """Editors on Windows write one."""
    write_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())

    assert open_checkpoint(ModelOptions(str(tmp_path))).tokenizer.vocab_size == 282


def test_folder_may_have_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    """Archives of Windows bring them, and Linux takes any bytes."""
    write_checkpoint(tmp_path / "mod\udce8le")

    assert open_checkpoint(ModelOptions(str(tmp_path / "mod\udce8le"))).tokenizer.vocab_size == 282


def test_the_tokenizer_that_was_named_is_held_to_the_vocabulary_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vocab_size=300)
    write_tokenizer(tmp_path / "larger")
    extra = {"extra_special_tokens": [f"<x{number}>" for number in range(19)]}
    (tmp_path / "larger" / "tokenizer_config.json").write_text(json.dumps(extra))

    with pytest.raises(CheckpointError, match="301 tokens, expected at most the 300"):
        open_checkpoint(ModelOptions(str(tmp_path), tokenizer=str(tmp_path / "larger")))


def test_another_text_encoders_slow_tokenizer_is_passed_over(tmp_path: Path) -> None:
    """A pipeline with CLIP and Qwen3 has vocab.json and merges.txt in `tokenizer`."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer" / "merges.txt").write_text("")
    write_tokenizer(tmp_path / "processor")
    request = Request("model.safetensors", ModelOptions("model.safetensors"))

    found = tokenizer_files.find_tokenizer(request, [tmp_path / "tokenizer", tmp_path / "processor"], 300)

    assert found.source == str(tmp_path / "processor" / "tokenizer.json")


def test_the_log_says_which_tokenizer_was_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO):
        open_checkpoint(ModelOptions(str(tmp_path)))

    assert f"its tokenizer is {tmp_path / 'tokenizer.json'}" in caplog.text
