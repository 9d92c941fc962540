import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import tokenizers

from encoder.checkpoint.files.demo_files import CONFIG
from encoder.checkpoint.files.demo_tokenizer import tokenizer_json
from encoder.errors import InvalidField
from encoder.pipeline.plan import padded_lengths, plan_jobs
from encoder.pipeline.tokenizer import Tokenizer
from encoder.presets.built_in import LAST_HIDDEN_STATE, get_preset
from encoder.presets.preset import Preset
from encoder.qwen3.config import Qwen3Config
from encoder.types import Job, TokenizedPrompt


def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json())))


def test_padding_to_the_window_and_to_the_longest() -> None:
    klein = get_preset("flux2-klein")

    assert padded_lengths([12, 30], klein) == [512, 512]
    assert padded_lengths([12, 30], replace(klein, padding="longest")) == [30, 30]


def lengths(num_tokens: list[int], **fields: Any) -> list[int]:
    return padded_lengths(num_tokens, Preset(name="x", description="", source="", layers=(0,), **fields))


def test_the_padded_length_may_be_a_multiple() -> None:
    """Nucleus rounds the longest prompt up to 8, and beyond the window if that is no multiple, as transformers does."""
    assert lengths([12, 17], pad_to_multiple_of=8) == [24, 24]
    assert lengths([16], pad_to_multiple_of=8) == [16]
    assert lengths([10], pad_to_multiple_of=8, max_sequence_length=10) == [16]


def test_prompts_may_be_padded_each_by_itself() -> None:
    """FLUX.3 rounds each prompt up to 80, and never beyond the window."""
    flux3 = get_preset("flux3")

    assert padded_lengths([1, 80, 81], flux3) == [80, 80, 160]
    assert padded_lengths([81, 100], replace(flux3, max_sequence_length=100)) == [100, 100]


@pytest.mark.parametrize(("padding", "expected"), [("longest", [3, 3]), ("own", [2, 3]), ("max_length", [9, 9])])
def test_the_padded_length_may_have_a_least(
    padding: Literal["longest", "own", "max_length"], expected: list[int]
) -> None:
    """Anima has a row for an empty prompt; a prompt that is longer is not padded for it."""
    assert lengths([0, 3], padding=padding, min_length=2, max_sequence_length=9) == expected


def test_a_prompt_without_tokens_has_no_rows_unless_told() -> None:
    assert lengths([0]) == [0]
    assert lengths([0], min_length=1) == [1]
    assert lengths([0], padding="own", pad_to_multiple_of=80) == [0]


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    """The embedding has no row for it, and MLX does not check its bounds."""
    config = Qwen3Config.from_dict(CONFIG)

    def plan(token: int) -> list[int]:
        prompt = TokenizedPrompt("", (3, token, 5), truncated=False)
        return [job.computed_rows for job in plan_jobs([prompt], LAST_HIDDEN_STATE, "float32", tokenizer(), config, 36)]

    assert plan(config.vocab_size - 1) == [3]
    with pytest.raises(InvalidField, match="token 282 is outside the checkpoint's vocabulary of 282"):
        plan(config.vocab_size)


ENDOFTEXT, IM_END = 256, 258


def plan(preset: Preset, num_tokens: int = 3) -> Job:
    prompt = TokenizedPrompt("", (1,) * num_tokens, truncated=False)
    [job] = plan_jobs([prompt], preset, "float32", tokenizer(), Qwen3Config.from_dict(CONFIG), 36)
    return job


LIVE = Preset(name="x", description="", source="", layers=(0,), padding="max_length", padding_rows="live")


def test_computed_padding_rows_hold_the_presets_token() -> None:
    assert plan(LIVE).pad_token_id == ENDOFTEXT
    assert plan(replace(LIVE, pad_token="<|im_end|>")).pad_token_id == IM_END


@pytest.mark.parametrize(
    "same", [{"padding_rows": "cut"}, {"padding_rows": "zero"}, {"padding_rows": "live", "max_sequence_length": 3}]
)
def test_where_no_padding_row_is_computed_the_token_splits_no_cache(same: dict[str, Any]) -> None:
    """Equal results have equal jobs."""
    assert plan(replace(LIVE, **same)) == plan(replace(LIVE, pad_token="<|im_end|>", **same))


def test_a_padding_token_that_the_tokenizer_lacks_is_refused_where_it_is_computed() -> None:
    """Any other token would give other rows without a word."""
    with pytest.raises(InvalidField, match=r"pad_token: x needs the token '<pad>', which the checkpoint's tokenizer"):
        plan(replace(LIVE, pad_token="<pad>"))
    assert plan(replace(LIVE, pad_token="<pad>", padding_rows="zero")).delivered_rows == 512
