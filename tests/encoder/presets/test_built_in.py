from dataclasses import replace

import pytest

from encoder.errors import InvalidField
from encoder.presets.built_in import PRESETS, get_preset
from encoder.presets.preset import Preset, check_preset
from encoder.types import Tap


def test_both_numberings_name_the_same_places() -> None:
    """layers k is hidden_states k+1, as long as the final norm is not involved."""
    klein = get_preset("flux2-klein")

    assert klein.taps(36) == (Tap(9, False), Tap(18, False), Tap(27, False))
    assert klein.taps(36) == replace(klein, layers=None, hidden_states=(9, 18, 27)).taps(36)


@pytest.mark.parametrize(
    ("numbering", "index", "tap"),
    [
        pytest.param("layers", 0, Tap(1, False), id="first layer"),
        pytest.param("layers", -1, Tap(4, False), id="last layer is un-normed"),
        pytest.param("hidden_states", 0, Tap(0, False), id="embedding output"),
        pytest.param("hidden_states", 4, Tap(4, True), id="last hidden state is normed"),
        pytest.param("hidden_states", -1, Tap(4, True), id="the same from the end"),
        pytest.param("hidden_states", -2, Tap(3, False), id="Z-Image"),
        pytest.param("hidden_states", -5, Tap(0, False), id="embedding output from the end"),
    ],
)
def test_an_index_names_one_place(numbering: str, index: int, tap: Tap) -> None:
    preset = Preset(name="x", description="", source="", **{numbering: (index,)})

    assert preset.taps(4) == (tap,)


@pytest.mark.parametrize(
    ("numbering", "index", "allowed"),
    [
        ("layers", 4, "-4 to 3"),
        ("layers", -5, "-4 to 3"),
        ("hidden_states", 5, "-5 to 4"),
        ("hidden_states", -6, "-5 to 4"),
    ],
)
def test_an_index_outside_the_model_is_refused_with_what_is_allowed(numbering: str, index: int, allowed: str) -> None:
    preset = Preset(name="x", description="", source="", **{numbering: (index,)})

    with pytest.raises(InvalidField, match=rf"^{numbering}: {index} does not exist; .* 4 decoder layers, .* {allowed}"):
        preset.taps(4)


@pytest.mark.parametrize("fields", [{}, {"layers": (1,), "hidden_states": (1,)}], ids=["neither", "both"])
def test_exactly_one_numbering_is_given(fields: dict[str, tuple[int, ...]]) -> None:
    preset = Preset(name="x", description="", source="", **fields)

    with pytest.raises(InvalidField, match="exactly one of layers and hidden_states"):
        preset.taps(4)


def test_names_and_aliases_are_unique() -> None:
    names = [name for preset in PRESETS for name in (preset.name, *preset.aliases)]

    assert len(set(names)) == len(names)
    assert all(get_preset(name) for name in names)


def test_an_unknown_preset_is_refused_with_all_names() -> None:
    with pytest.raises(InvalidField, match=r"preset: 'flux' does not exist; allowed are .*flux2-klein, .*z-image"):
        get_preset("flux")


def test_a_preset_whose_layers_do_not_exist_is_refused() -> None:
    with pytest.raises(InvalidField, match="layers: 26 does not exist; this checkpoint has 24 decoder layers"):
        check_preset(get_preset("flux2-klein"), num_hidden_layers=24, hidden_size=1024)


def test_a_preset_of_another_hidden_size_is_refused() -> None:
    with pytest.raises(
        InvalidField, match="flux2-klein-9b expects a checkpoint of hidden_size 4096, this one has 2560"
    ):
        check_preset(get_preset("flux2-klein-9b"), num_hidden_layers=36, hidden_size=2560)


def test_every_system_says_what_its_tokenizer_adds() -> None:
    """Else the ids would depend on the tokenizer that the weights come with."""
    silent = {preset.name for preset in PRESETS if preset.add_special_tokens and preset.closing_token is None}

    assert silent == {"last-hidden-state", "prx-pixel"}  # whatever the checkpoint's adds, and one that nobody could see


def test_a_preset_whose_padding_token_does_not_exist_is_refused() -> None:
    """FLUX.2 klein delivers the rows of hundreds of them; Z-Image delivers none."""
    dims = {"num_hidden_layers": 36, "hidden_size": 2560}
    with pytest.raises(InvalidField, match=r"pad_token: flux2-klein needs the token '<\|endoftext\|>'"):
        check_preset(get_preset("flux2-klein"), **dims, has_token=lambda token: False)
    check_preset(get_preset("z-image"), **dims, has_token=lambda token: False)


def test_every_preset_names_its_source() -> None:
    assert all(preset.source and preset.description for preset in PRESETS)
