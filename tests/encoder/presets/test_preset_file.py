from pathlib import Path

import pytest

from encoder import BUILT_IN, Catalog, PresetFileError, get_preset, read_presets

EXAMPLE = Path(__file__).parents[3] / "examples" / "presets.toml"


def read(folder: Path, text: str) -> Catalog:
    file = folder / "my.toml"
    file.write_text(text, encoding="utf-8")
    return read_presets(file, BUILT_IN)


def test_a_table_is_a_preset_after_the_built_in_ones(tmp_path: Path) -> None:
    catalog = read(tmp_path, '[mine]\nlayers = [1, -1]\nprefix = "user: "\ncombine = "stack"\naliases = ["my/own"]\n')

    mine = catalog.get("my/own")
    assert [*catalog] == [*BUILT_IN, mine]
    assert (mine.name, mine.layers, mine.prefix, mine.combine, mine.source) == (
        "mine",
        (1, -1),
        "user: ",
        "stack",
        "my.toml",
    )


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Editors on Windows write one."""
    assert "mine" in [preset.name for preset in read(tmp_path, "\ufeff[mine]\nlayers = [1]\n")]


def test_fields_that_a_table_does_not_give_are_those_of_its_base(tmp_path: Path) -> None:
    catalog = read(tmp_path, '[a]\nbase = "z-image-turbo"\nmax_sequence_length = 64\n[b]\nbase = "a"\nprefix = ""\n')

    z_image, a, b = get_preset("z-image"), catalog.get("a"), catalog.get("b")
    assert (a.suffix, a.layers, a.max_sequence_length, a.aliases) == (z_image.suffix, z_image.layers, 64, ())
    assert (b.prefix, b.suffix, b.max_sequence_length) == ("", z_image.suffix, 64)


def test_a_numbering_replaces_the_other_one_of_the_base(tmp_path: Path) -> None:
    klein = read(tmp_path, '[a]\nbase = "flux2-klein"\nhidden_states = [3, -1]\n').get("a")

    assert (klein.layers, klein.hidden_states) == (None, (3, -1))


def test_a_negative_preset_may_be_further_down(tmp_path: Path) -> None:
    catalog = read(tmp_path, '[a]\nbase = "z-image"\nnegative_preset = "b"\n[b]\nbase = "z-image"\n')

    assert catalog.get(catalog.get("a").negative_preset).name == "b"


def test_an_empty_file_adds_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "") == BUILT_IN


def test_the_example_is_valid() -> None:
    assert read_presets(EXAMPLE, BUILT_IN).get("tail-4").combine == "stack_rows"


LAYERS = "[a]\nlayers = [1]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("[z-image]\nlayers = [1]", ["z-image", "is taken"], id="a built-in preset"),
        pytest.param("[z-image-turbo]\nlayers = [1]", ["z-image-turbo", "is taken"], id="a built-in alias"),
        pytest.param(LAYERS + 'aliases = ["z-image"]', ["a:", "'z-image' is taken"], id="an alias that is taken"),
        pytest.param(LAYERS + 'aliases = ["a"]', ["aliases", "twice"], id="an alias twice"),
        pytest.param('["a b"]\nlayers = [1]', ["'a b'", "letters"], id="a name with a blank"),
        pytest.param("a = 1", ["a: is 1", "expected a table"], id="no table"),
        pytest.param("[a]", ["a:", "exactly one of layers and hidden_states"], id="no hidden states"),
        pytest.param(LAYERS + "hidden_states = [2]", ["exactly one"], id="both numberings"),
        pytest.param(LAYERS + "paddin = 1", ["a: paddin is not a field", "padding_rows"], id="unknown field"),
        pytest.param(LAYERS + "name = 'b'", ["a: name is not a field"], id="name as a field"),
        pytest.param("[a]\nlayers = 1", ["layers is 1", "a list, each item an integer"], id="no list"),
        pytest.param("[a]\nlayers = []", ["layers is empty"], id="empty list"),
        pytest.param("[a]\nlayers = [true]", ["layers is [True]", "an integer"], id="bool as a number"),
        pytest.param("[a]\nlayers = [1.0]", ["layers is [1.0]"], id="float as a number"),
        pytest.param(LAYERS + "prefix = 3", ["prefix is 3", "a string"], id="no string"),
        pytest.param(LAYERS + "unit_rms = 1", ["unit_rms is 1", "true or false"], id="number as a bool"),
        pytest.param(LAYERS + 'padding = "some"', ["'some'", '"longest", "max_length", "own"'], id="choice"),
        pytest.param(LAYERS + "max_sequence_length = 0", ["max_sequence_length is 0", "at least 1"], id="no window"),
        pytest.param(LAYERS + "dropped_rows = 512", ["dropped_rows", "window of 512"], id="nothing left"),
        pytest.param(LAYERS + "bundle = 2", ["bundle is 2", "divisor"], id="bundle of a remainder"),
        pytest.param(LAYERS + "pad_position = 1", ["pad_position", "live"], id="position of rows not computed"),
        pytest.param(LAYERS + 'tail = "."\npadding_rows = "live"', ["tail", "live"], id="tail behind live padding"),
        pytest.param(
            LAYERS + 'closing_token = "."\noverlong = "cut_prompt"', ["cut_prompt", "suffix"], id="closing a cut prompt"
        ),
        pytest.param('[a]\nbase = "nope"', ["base is 'nope'"], id="unknown base"),
        pytest.param('[a]\nbase = "b"\n[b]\nlayers = [1]', ["base is 'b'", "further up"], id="base further down"),
        pytest.param(LAYERS + 'negative_preset = "b"', ["negative_preset is 'b'"], id="unknown negative"),
        pytest.param("[a\n", ["is not TOML", "line 1"], id="no TOML"),
        pytest.param(LAYERS + LAYERS, ["is not TOML"], id="a table twice"),
    ],
)
def test_a_problem_names_file_preset_and_field_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(PresetFileError) as caught:
        read(tmp_path, text)

    message = str(caught.value)
    assert "\n" not in message
    for word in ["my.toml: ", *words]:
        assert word in message


def test_one_error_lists_all_problems(tmp_path: Path) -> None:
    with pytest.raises(PresetFileError, match=r"a: prefix is 1.*; a: overlong is 'x'.*; b: give exactly one"):
        read(tmp_path, '[a]\nprefix = 1\noverlong = "x"\n[b]\n')


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'[a]\nprefix = "\xe9"\n')
    for name, word in (("nowhere", "No such file"), ("latin", "not UTF-8"), (".", "is a folder")):
        with pytest.raises(PresetFileError, match=word):
            read_presets(tmp_path / name, BUILT_IN)
