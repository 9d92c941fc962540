"""What all errors share."""

from pathlib import Path

import pytest

from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize(("name", "shown"), [("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"), ("\udcff", r"\udcff")])
def test_message_is_one_line_of_text_whatever_the_name_of_a_file(tmp_path: Path, name: str, shown: str) -> None:
    """A name may have line breaks, colours of terminals, and bytes that are no UTF-8, which no log could write."""
    write_checkpoint(tmp_path / name)
    (tmp_path / name / "model.safetensors").unlink()

    with pytest.raises(CheckpointError) as error:
        open_checkpoint(ModelOptions(str(tmp_path / name)))
    assert str(error.value).startswith(f"{tmp_path}/{shown}: has no *.safetensors file")
    assert str(error.value).encode().isascii()


def test_long_values_are_cut_and_names_of_files_are_not() -> None:
    """Libraries repeat the whole value that they do not like."""
    path = "/".join(["n" * 255] * 3)

    assert len(str(CheckpointError(f"{path}: found {[0] * 100_000}, expected y"))) < 5000
    assert str(CheckpointError(f"{path}: found {'x' * 100_000} expected y")) == f"{path}: found {'x' * 100}… expected y"
