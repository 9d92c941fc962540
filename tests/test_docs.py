"""The documents say what the code says, where a machine can tell."""

import re
from pathlib import Path

import pytest

from encoder import PRESETS, Preset

PRESETS_MD = Path(__file__).parents[1] / "docs" / "presets.md"


def preset_rows() -> dict[str, list[str]]:
    """The cells behind each name of the table of presets."""
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PRESETS_MD.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_every_preset_has_its_row_and_every_row_its_preset() -> None:
    """Whoever uses a system finds how to plug it in, in the order in which GET /presets lists them."""
    assert list(preset_rows()) == [preset.name for preset in PRESETS]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_presets_row_says_its_window_padding_and_shape(preset: Preset) -> None:
    """These change with the preset, so they must change together."""
    window, padding, reply, *_ = preset_rows()[preset.name]
    axes = 4 if preset.combine.startswith("stack") else 3

    assert window == str(preset.max_sequence_length)
    assert padding == preset.padding_rows
    assert len(re.findall(r"[^,\]\[]+", reply.split("`")[1])) == axes
    assert ("n-" in reply) == (preset.dropped_rows > 0 and preset.padding_rows == "cut")


def test_aliases_are_documented() -> None:
    """They are names like others."""
    text = PRESETS_MD.read_text(encoding="utf-8")

    assert all(f"`{alias}` is `{preset.name}`" in text for preset in PRESETS for alias in preset.aliases)


def test_the_tree_names_every_file() -> None:
    """docs/architecture.md is where a newcomer looks first."""
    root = Path(__file__).parent.parent
    tree = (root / "docs/architecture.md").read_text(encoding="utf-8")
    files = [
        file for package in ("app", "encoder") for file in (root / package).glob("*.py") if file.stat().st_size > 100
    ]

    assert [file.name for file in files if f"\n  {file.name} " not in tree] == []
