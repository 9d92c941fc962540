"""The small JSON files beside the weights, as other systems write them."""

import json
from pathlib import Path

import pytest

from encoder.checkpoint.files.json_file import read_json_object


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_as_tools_on_windows_write_it(tmp_path: Path, encoding: str) -> None:
    """PowerShell writes a byte order mark, and its older versions UTF-16."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "qwen3", "note": "é"}, ensure_ascii=False), encoding=encoding)

    assert read_json_object(file) == {"model_type": "qwen3", "note": "é"}
