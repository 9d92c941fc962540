"""Requests of many systems in one batch, on one checkpoint."""

import random
from dataclasses import replace

import numpy as np
import pytest

from encoder import PRESETS, Preset, PromptEmbeds, TextEncoder
from encoder.errors import InvalidField
from encoder.types import Job
from tests.parity.presets.compare import PROMPTS
from tests.reference import relative_error

pytestmark = pytest.mark.parity

WINDOW = 192  # instead of 512 and more, for the sake of time; LingBot-Video drops 140 rows
SAME = 1e-5  # other shapes, other order of sums; a row that sees its neighbour's is off by 1e-1
SOME = [prompt for case in PROMPTS for prompt in case.values[0]]


def fits(preset: Preset, text_encoder: TextEncoder) -> bool:
    try:
        preset.taps(text_encoder.config.num_hidden_layers)
    except InvalidField:
        return False
    return preset.hidden_size in (None, text_encoder.config.hidden_size)


def jobs_of_all_presets(text_encoder: TextEncoder) -> list[Job]:
    """A job for each preset that fits, each with another prompt, in an order that means nothing."""
    presets = [
        replace(preset, max_sequence_length=WINDOW, overlong="cut") for preset in PRESETS if fits(preset, text_encoder)
    ]
    jobs = [
        job
        for index, preset in enumerate(presets)
        for job in text_encoder.plan(text_encoder.tokenize([SOME[index % len(SOME)]], preset), preset, "float32")
    ]
    random.Random(0).shuffle(jobs)
    return jobs


def test_every_preset_in_one_batch_gives_what_it_gives_alone(qwen3_vl: TextEncoder) -> None:
    """Lengths, windows, taps, live and cut padding, tails and positions side by side change nothing."""
    jobs = jobs_of_all_presets(qwen3_vl)
    together = qwen3_vl.run(jobs)

    assert len(jobs) == len(PRESETS) - 3  # without MiniMax-H3, and the two FLUX.2 klein of a size
    for job, beside in zip(jobs, together, strict=True):
        [alone] = qwen3_vl.run([job])
        assert isinstance(beside, PromptEmbeds) and isinstance(alone, PromptEmbeds)
        np.testing.assert_array_equal(beside.attention_mask, alone.attention_mask)
        np.testing.assert_array_equal(beside.hidden_states.any(axis=-1), alone.hidden_states.any(axis=-1))
        rows = alone.hidden_states.any(axis=-1)
        assert relative_error(beside.hidden_states[rows], alone.hidden_states[rows]) < SAME
