"""The window of each preset is what a pipeline's call uses unless told otherwise."""

import inspect
from typing import Any

import pytest

from encoder import get_preset

diffusers = pytest.importorskip("diffusers", minversion="0.42.1", reason="needs diffusers 0.42.1: make test-parity")

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("preset", "pipeline", "parameter", "template"),
    [
        ("flux2-klein", "Flux2KleinPipeline", "max_sequence_length", 0),
        ("z-image", "ZImagePipeline", "max_sequence_length", 0),
        ("z-image-omni", "ZImageOmniPipeline", "max_sequence_length", 0),
        ("ovis-image", "OvisImagePipeline", "max_sequence_length", 28),
        ("krea-2", "Krea2Pipeline", "max_sequence_length", 34),
        ("ideogram-4", "Ideogram4Pipeline", "max_sequence_length", 0),
        ("joyimage-edit-plus", "JoyImageEditPlusPipeline", "max_sequence_length", 34),
        ("dreamlite", "DreamLitePipeline", "max_sequence_length", 34),
        ("dreamlite", "DreamLiteMobilePipeline", "max_sequence_length", 34),
        ("ace-step", "AceStepPipeline", "max_text_length", 0),
        ("ace-step-lyrics", "AceStepPipeline", "max_lyric_length", 0),
    ],
)
def test_window_is_the_default_of_the_call(preset: str, pipeline: str, parameter: str, template: int) -> None:
    """Some pipelines count the rows that they keep, and add the rows of the template that they drop."""
    parameters = inspect.signature(getattr(diffusers, pipeline).__call__).parameters

    assert get_preset(preset).max_sequence_length == parameters[parameter].default + template


@pytest.mark.parametrize(
    ("preset", "module", "step"),
    [
        ("flux3", "flux3", "Flux3TextEncoderStep"),
        ("anima", "anima", "AnimaTextEncoderStep"),
    ],
)
def test_window_is_the_default_of_the_modular_block(preset: str, module: str, step: str) -> None:
    """Blocks name their inputs themselves."""
    encoders = pytest.importorskip(f"diffusers.modular_pipelines.{module}.encoders")
    defaults: dict[str, Any] = {parameter.name: parameter.default for parameter in getattr(encoders, step)().inputs}

    assert get_preset(preset).max_sequence_length == defaults["max_sequence_length"]


def test_window_of_prx_pixel_is_the_pipelines() -> None:
    """It is part of the pipeline's configuration."""
    parameters = inspect.signature(diffusers.PRXPixelPipeline.__init__).parameters

    assert get_preset("prx-pixel").max_sequence_length == parameters["prompt_max_tokens"].default
