"""A model that is loaded in part: the layers that are there give what the whole model gives, the others are refused."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, Engine, InvalidField, Preset, TextEncoder
from encoder.options import ModelOptions
from tests.checkpoints import write_checkpoint


def layers(*wanted: int) -> Preset:
    return Preset(name="wanted", description="for the test", source="none", layers=wanted, max_sequence_length=64)


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (-4,)])
def test_loaded_layers_give_what_they_give_in_the_whole_model(tmp_path: Path, wanted: tuple[int, ...]) -> None:
    """A negative layer counts from the end of the whole model."""
    write_checkpoint(tmp_path, num_hidden_layers=6)
    [whole] = TextEncoder.open(ModelOptions(str(tmp_path))).encode(["a cat"], layers(*wanted), "float32")
    [part] = TextEncoder.open(ModelOptions(str(tmp_path), num_layers=3)).encode(["a cat"], layers(*wanted), "float32")

    np.testing.assert_array_equal(part.hidden_states, whole.hidden_states)


@pytest.mark.parametrize(
    ("preset", "field"), [(layers(3), "layers"), (layers(-1), "layers"), (LAST_HIDDEN_STATE, "hidden_states")]
)
def test_layers_that_are_not_loaded_are_refused(tmp_path: Path, preset: Preset, field: str) -> None:
    """And not answered with the last one that is there."""
    write_checkpoint(tmp_path, num_hidden_layers=6)
    encoder = TextEncoder.open(ModelOptions(str(tmp_path), num_layers=3))

    with pytest.raises(InvalidField, match=rf"{field}: .* needs \d decoder layers, and 3 of 6 were loaded"):
        encoder.encode(["a cat"], preset)


async def start_and_encode(options: ModelOptions) -> int:
    engine = Engine(options)
    await engine.start()
    try:
        result = await engine.encode(["a cat"], layers(1))
        return result.layers_run
    finally:
        await engine.close()


def test_the_engine_warms_up_loaded_layers_only(tmp_path: Path) -> None:
    """Its first forward pass must not ask for the last layer."""
    write_checkpoint(tmp_path, num_hidden_layers=6)

    assert asyncio.run(start_and_encode(ModelOptions(str(tmp_path), num_layers=3))) == 2
