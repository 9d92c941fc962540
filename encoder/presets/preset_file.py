"""Reads and checks a user's presets from a TOML file, which has a table for each preset.

    [my-klein]
    base = "flux2-klein"            # a built-in preset or one further up; the other keys replace its fields
    description = "FLUX.2 klein behind a system turn."
    prefix = "<|im_start|>system\\nBe literal.<|im_end|>\\n<|im_start|>user\\n"

The keys are `base` and the fields of `Preset`. One error lists all problems of a file.
"""

import re
import tomllib
import types
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from encoder.errors import PresetFileError
from encoder.messages import shown
from encoder.presets.catalog import Catalog
from encoder.presets.preset import Preset
from encoder.regular_file import UnfitFile, read_file

Table = dict[str, Any]

_MAX_BYTES = 2**20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
TYPES = {field.name: get_type_hints(Preset)[field.name] for field in fields(Preset) if field.name != "name"}
MINIMUM = {
    "max_sequence_length": 1,
    "pad_to_multiple_of": 1,
    "bundle": 1,
    "hidden_size": 1,
    "min_length": 0,
    "pad_position": 0,
    "dropped_rows": 0,
}
TYPE_NAMES = {str: "a string", int: "an integer", bool: "true or false"}


def read_presets(file: Path, catalog: Catalog) -> Catalog:
    """A catalog of the presets in `catalog` followed by those in `file`.

    Errors: PresetFileError naming file, preset and field of each problem.
    """
    problems: list[str] = []
    for name, table in _parse(file).items():
        found = list(_problems(name, table, catalog))
        if not found:
            preset = _preset(name, table, catalog, file)
            found = list(_contradictions(preset))
            catalog = catalog.with_presets([preset])
        problems += [f"{name}: {problem}" for problem in found]
    problems += _missing_negatives(catalog)
    if problems:
        raise PresetFileError(f"{file}: {'; '.join(problems)}.")
    return catalog


def _parse(file: Path) -> Table:
    try:
        return tomllib.loads(read_file(file, _MAX_BYTES).decode("utf-8-sig"))  # editors on Windows write a BOM
    except UnfitFile as error:
        raise PresetFileError(f"{file}: {error.strerror}.") from error
    except OSError as error:
        raise PresetFileError(f"{file}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PresetFileError(
            f"{file}: is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PresetFileError(f"{file}: is not TOML: {error}.") from error


def _preset(name: str, table: Table, catalog: Catalog, file: Path) -> Preset:
    """The preset of a table that `_problems` has passed."""
    given: Table = {"source": file.name}
    given |= {key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key != "base"}
    if "base" not in table:
        return Preset(**Table(name=name, description="") | given)
    if "layers" in given or "hidden_states" in given:  # the table's numbering replaces the base's
        given = {"layers": None, "hidden_states": None} | given
    return replace(catalog.get(table["base"]), **Table(name=name, aliases=()) | given)


def _problems(name: str, table: object, catalog: Catalog) -> Iterator[str]:
    """What is wrong with the name and with each value on its own."""
    if not isinstance(table, dict):
        yield f"is {shown(table)}, expected a table: [{name}]"
        return
    yield from _name_problems(name, catalog)
    for key, value in table.items():
        if key == "base":
            if value not in catalog:
                yield f"base is {shown(value)}, expected the name of a preset, built in or further up"
        elif key not in TYPES:
            yield f"{key} is not a field of a preset; fields are base, {', '.join(TYPES)}"
        elif not _fits(value, TYPES[key]):
            yield f"{key} is {shown(value)}, expected {_expected(TYPES[key])}"
        elif value == []:
            yield f"{key} is empty, expected at least one"
        elif key in MINIMUM and value < MINIMUM[key]:
            yield f"{key} is {value}, expected at least {MINIMUM[key]}"
        elif key == "aliases":
            for alias in value:
                yield from _name_problems(alias, catalog)


def _name_problems(name: str, catalog: Catalog) -> Iterator[str]:
    if not NAME.fullmatch(name):
        yield f"the name {shown(name)} may have letters, digits and ._/- only, and starts with a letter or digit"
    elif name in catalog:
        yield f"the name {shown(name)} is taken; this file adds presets and cannot change one"


def _contradictions(preset: Preset) -> Iterator[str]:
    """Values that are valid on their own and contradict each other."""
    if (preset.layers is None) == (preset.hidden_states is None):
        yield "give exactly one of layers and hidden_states"
    if len(preset.layers or preset.hidden_states or ()) % preset.bundle:
        yield f"bundle is {preset.bundle}, expected a divisor of the number of hidden states"
    if preset.pad_position is not None and preset.padding_rows != "live":
        yield f'pad_position needs padding_rows "live", and padding_rows is "{preset.padding_rows}"'
    if preset.tail and preset.padding_rows == "live":
        yield 'tail needs padding_rows "cut" or "zero", and padding_rows is "live"'
    if preset.closing_token and preset.overlong == "cut_prompt":
        yield 'overlong "cut_prompt" adds no closing_token; put it at the end of suffix'
    if preset.dropped_rows >= preset.max_sequence_length:
        yield f"dropped_rows is {preset.dropped_rows}, expected less than the window of {preset.max_sequence_length}"
    for name in {preset.name, *preset.aliases}:
        if (preset.name, *preset.aliases).count(name) > 1:
            yield f"aliases: the name {shown(name)} is given twice"


def _missing_negatives(catalog: Catalog) -> Iterator[str]:
    """Negative presets that do not exist. Checked at the end, since a preset may name one further down."""
    for preset in catalog:
        if preset.negative_preset is not None and preset.negative_preset not in catalog:
            yield f"{preset.name}: negative_preset is {shown(preset.negative_preset)}, expected the name of a preset"


def _fits(value: object, kind: Any) -> bool:
    """Whether a TOML value matches the annotation of a field of Preset."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    return type(value) is kind  # isinstance would take a bool for an int


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each item {TYPE_NAMES[get_args(kind)[0]]}"
    if get_origin(kind) in (Union, types.UnionType):
        return _expected(get_args(kind)[0])  # TOML has no None
    return TYPE_NAMES[kind]
