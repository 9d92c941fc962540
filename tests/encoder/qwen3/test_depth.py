"""How many layers are loaded follows from the presets that are served, before any weight is read."""

from dataclasses import replace

import pytest

from encoder import BUILT_IN, CheckpointError, Depth, choose_depth, get_preset
from encoder.qwen3.config import Qwen3Config

CONFIG_4B = Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40960,
)


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        pytest.param([], 36, id="any preset"),
        pytest.param(["flux2-klein"], 27, id="layers from the front"),
        pytest.param(["z-image"], 35, id="layers from the end"),
        pytest.param(["flux2-klein", "z-image"], 35, id="the deepest of two"),
        pytest.param(["last-hidden-state"], 36, id="the last hidden state"),
        pytest.param(["ace-step-lyrics"], 0, id="the embedding alone"),
        pytest.param(["flux2-klein-9b", "flux2-klein-4b"], 27, id="one that fits beside one that does not"),
    ],
)
def test_the_deepest_preset_that_fits_decides(names: list[str], layers: int) -> None:
    depth = choose_depth(CONFIG_4B, presets=[get_preset(name) for name in names])

    assert depth.layers == layers


def test_the_reason_names_the_deepest_preset() -> None:
    depth = choose_depth(CONFIG_4B, presets=[get_preset("flux2-klein"), get_preset("z-image")])

    assert depth.reason.startswith("z-image needs")


def test_negative_layers_count_from_the_end_of_this_checkpoint() -> None:
    assert choose_depth(replace(CONFIG_4B, num_hidden_layers=28), presets=[get_preset("z-image")]).layers == 27


def test_presets_of_which_none_fits_are_refused_with_the_reason() -> None:
    with pytest.raises(CheckpointError, match=r"flux2-klein-9b: .*hidden_size 4096, this one has 2560"):
        choose_depth(CONFIG_4B, presets=[get_preset("flux2-klein-9b")])


def test_num_layers_may_be_more_than_the_presets_need_and_not_less() -> None:
    klein = [get_preset("flux2-klein")]

    assert choose_depth(CONFIG_4B, 30, klein) == Depth(30, "set by num_layers")
    with pytest.raises(CheckpointError, match=r"num_layers is 20, and flux2-klein needs 27"):
        choose_depth(CONFIG_4B, 20, klein)


def test_more_layers_than_there_are_means_all() -> None:
    assert choose_depth(CONFIG_4B, 99).layers == 36


def test_presets_that_are_served_alone_bring_what_encodes_their_negatives() -> None:
    catalog = BUILT_IN.only(["dreamlite"])

    assert [preset.name for preset in catalog] == ["dreamlite", "dreamlite-negative"]
    assert catalog.default == "dreamlite"


def test_the_default_stays_where_it_is_served() -> None:
    assert BUILT_IN.only(["z-image", "last-hidden-state"]).default == "last-hidden-state"
