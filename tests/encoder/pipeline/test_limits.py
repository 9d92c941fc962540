"""Limits on one request: at the bound it passes, one more is refused."""

from collections.abc import Sequence
from typing import Any

import pytest

from encoder.errors import RequestTooLarge
from encoder.pipeline.limits import Limits
from encoder.presets.preset import Preset
from encoder.types import DType, Job, Tap

HIDDEN_SIZE = 10


def make_preset(**fields: Any) -> Preset:
    return Preset(name="x", description="", source="", layers=(0,), **fields)


def make_jobs(delivered_rows: Sequence[int], layers: int = 1, dtype: DType = "bfloat16") -> list[Job]:
    return [
        Job(
            input_ids=(1,),
            computed_rows=1,
            delivered_rows=rows,
            dropped_rows=0,
            taps=tuple(Tap(layer, normed=False) for layer in range(layers)),
            combine="concat",
            dtype=dtype,
        )
        for rows in delivered_rows
    ]


@pytest.mark.parametrize(
    ("jobs", "size"),
    [
        pytest.param(make_jobs([3]), 3 * HIDDEN_SIZE * 2, id="one-prompt"),
        pytest.param(make_jobs([3, 3]), 2 * 3 * HIDDEN_SIZE * 2, id="two-prompts"),
        pytest.param(make_jobs([1, 7, 2]), 3 * 7 * HIDDEN_SIZE * 2, id="as-long-as-the-longest"),
        pytest.param(make_jobs([3], layers=4), 3 * 4 * HIDDEN_SIZE * 2, id="layers"),
        pytest.param(make_jobs([3], dtype="float32"), 3 * HIDDEN_SIZE * 4, id="dtype"),
    ],
)
def test_the_output_of_all_prompts_and_layers_counts(jobs: list[Job], size: int) -> None:
    """A reply is one tensor: each prompt takes as many rows as the longest."""
    Limits(max_output_bytes=size).check_output(jobs, HIDDEN_SIZE)

    with pytest.raises(RequestTooLarge, match=f"would take {size} bytes, allowed are {size - 1}"):
        Limits(max_output_bytes=size - 1).check_output(jobs, HIDDEN_SIZE)


@pytest.mark.parametrize(
    ("prompts", "fields", "characters"),
    [
        pytest.param(["abc"], {}, 3, id="prompt"),
        pytest.param(["abc", "abcde", "a"], {}, 5, id="longest-prompt"),
        pytest.param(["abc"], {"prefix": "12"}, 5, id="prefix"),
        pytest.param(["abc"], {"suffix": "1234"}, 7, id="suffix"),
        pytest.param(["abc"], {"tail": "12345"}, 8, id="tail"),
        pytest.param(["abc"], {"prefix": "1", "empty_prefix": "1234567"}, 4, id="other-prefix-when-blank"),
        pytest.param([" "], {"prefix": "1", "empty_prefix": "1234567"}, 8, id="blank"),
        pytest.param([""], {"prefix": "1", "empty_prompt": "123456"}, 7, id="empty"),
        pytest.param(["abcd", ""], {"empty_prefix": "1234567"}, 7, id="empty-beside-another"),
    ],
)
def test_the_template_counts_towards_the_characters_of_a_prompt(
    prompts: list[str], fields: dict[str, str], characters: int
) -> None:
    """All of it is tokenized, and a request may bring a template of its own."""
    preset = make_preset(**fields)
    Limits(max_prompt_chars=characters).check_prompts(prompts, preset)

    with pytest.raises(RequestTooLarge, match=f"one has {characters} characters .* allowed are {characters - 1}"):
        Limits(max_prompt_chars=characters - 1).check_prompts(prompts, preset)
