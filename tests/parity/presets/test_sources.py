"""The source that a preset names is code that exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from encoder import PRESETS, Preset

PACKAGES = ("diffusers", "transformers")
SOURCE = re.compile(r"(?P<package>\w+): (?P<file>[\w/]+\.py), (?:\w+\.)?(?P<function>\w+)")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS if preset.source.startswith(PACKAGES)], ids=lambda preset: preset.name
)
def test_the_source_of_a_preset_names_a_file_and_a_function_in_it(preset: Preset) -> None:
    """Whoever checks a preset against its source has to find it."""
    source = SOURCE.fullmatch(preset.source)
    assert source is not None, preset.source
    package = importlib.util.find_spec(source["package"])
    if package is None or package.origin is None:
        pytest.skip(f"needs {source['package']}: make test-parity")

    code = (Path(package.origin).parent / source["file"]).read_text(encoding="utf-8")

    assert f"def {source['function']}(" in code
