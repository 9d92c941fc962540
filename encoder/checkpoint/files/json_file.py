"""Reads the small JSON files beside the weights."""

import json
from pathlib import Path
from typing import Any

from encoder.checkpoint.files.lookalikes import explain_lookalike
from encoder.checkpoint.files.unreadable import unreadable
from encoder.errors import CheckpointError

_MAX_BYTES = 16 * 2**20


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Errors: CheckpointError when the file is missing, unreadable, larger than 16 MiB, no JSON, or no object.
    """
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise CheckpointError(f"{file}: is {size:,} bytes, expected at most {_MAX_BYTES:,}.")
        value = json.loads(file.read_bytes())
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
