"""Reads the small JSON files beside the weights."""

import json
from pathlib import Path
from typing import Any

from encoder.checkpoint.files.lookalikes import explain_lookalike
from encoder.checkpoint.files.unreadable import unreadable
from encoder.errors import CheckpointError
from encoder.regular_file import read_file

# The index of a Qwen3 of 64 layers in three arrays each has 200 KB. Once parsed, JSON takes up to 25 times its bytes.
_MAX_BYTES = 4 * 2**20


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Errors: CheckpointError when it is missing, unreadable, no regular file, larger than 4 MiB, no JSON, or no object.
    """
    try:
        value = json.loads(read_file(file, _MAX_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: does not exist. Is this the folder of a Qwen3 checkpoint?") from error
    except OSError as error:
        raise unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        found = explain_lookalike(file) or f"cannot be read as JSON: {error}. Correct it, or fetch it again."
        raise CheckpointError(f"{file}: {found}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, expected an object.")
    return value
