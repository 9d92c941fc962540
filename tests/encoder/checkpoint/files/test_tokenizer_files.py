"""Which tokenizer weights without one get, and when the log says that it does not fit them."""

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


@pytest.mark.parametrize(("vocab_size", "warned"), [(281, True), (282, False), (300, False)])
def test_tokenizer_with_more_tokens_than_the_model_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, vocab_size: int, warned: bool
) -> None:
    """Small test models come with the full tokenizer; only a prompt with a token beyond them must be refused."""
    write_checkpoint(tmp_path, vocab_size=vocab_size)
    open_checkpoint(ModelOptions(str(tmp_path)))

    message = f"the tokenizer has 282 tokens, expected at most the {vocab_size} of the model's vocabulary"
    assert (message in caplog.text) == warned
