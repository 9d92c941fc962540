"""JSON that stands in a file of tensors: in its header, or as an array of bytes."""

import json
from typing import Any

from encoder.errors import CheckpointError


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The object that a text is.

    Args:
        text: of a bounded length.
        where: what holds it, for messages.
    Errors: CheckpointError when it is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is {value!r:.80}, expected an object.")
    return value
