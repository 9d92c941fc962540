"""What config.json says of the quantization: `quantization_config`, as Hugging Face's libraries write it."""

from collections.abc import Mapping
from typing import Any

from encoder.checkpoint.tensors.assemble import Hints

_PLACES = ("quantization_config", "compression_config")  # the second is compressed-tensors' own, until 2024


def quantization_config(hints: Hints) -> Mapping[str, Any]:
    """The section of config.json, or of its `text_config`; empty where there is none."""
    nested = hints.config.get("text_config")
    for config in (hints.config, nested if isinstance(nested, dict) else {}):
        for place in _PLACES:
            section = config.get(place)
            if isinstance(section, dict):
                return section
    return {}


def text_of(section: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is a text, in lower case; "" where none is."""
    return next((value.lower() for name in names if isinstance(value := section.get(name), str)), "")
