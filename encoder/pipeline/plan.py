"""Tokenized prompts in, jobs out: which rows run through the model and which are delivered.

Applies a preset's padding, layers and combination to each prompt of a request. Knows nothing of tensors.
"""

from collections.abc import Sequence

from encoder.errors import InvalidField
from encoder.presets.preset import Preset, check_preset
from encoder.qwen3.config import Qwen3Config
from encoder.types import DType, Job, TokenizedPrompt


def plan_jobs(
    prompts: Sequence[TokenizedPrompt], preset: Preset, dtype: DType, config: Qwen3Config, num_layers: int
) -> list[Job]:
    """What must be computed for the prompts of one request: a job for each, in their order.

    Args:
        prompts: of one request; some presets pad all of them to the longest.
        preset: what the request asks for.
        dtype: of the results.
        config: the checkpoint's dims.
        num_layers: decoder layers that are loaded.
    Errors: InvalidField when the preset does not fit the checkpoint, or a token is outside its vocabulary.
    """
    check_preset(preset, config.num_hidden_layers, config.hidden_size, num_layers)
    lengths = padded_lengths([len(prompt.input_ids) for prompt in prompts], preset)
    return [
        _job(prompt, padded_length, preset, dtype, config)
        for prompt, padded_length in zip(prompts, lengths, strict=True)
    ]


def padded_lengths(num_tokens: Sequence[int], preset: Preset) -> list[int]:
    """The length of each prompt of one request after the preset's padding, in tokens."""
    longest = {"own": 0, "longest": max(num_tokens), "max_length": preset.max_sequence_length}[preset.padding]
    multiple = preset.pad_to_multiple_of
    rounded = [-(-max(longest, n, preset.min_length) // multiple) * multiple for n in num_tokens]
    return [min(n, preset.max_sequence_length) for n in rounded] if preset.padding == "own" else rounded


def _job(prompt: TokenizedPrompt, padded_length: int, preset: Preset, dtype: DType, config: Qwen3Config) -> Job:
    num_tokens = len(prompt.input_ids)
    # Padding rows that share one position are equal: one is computed and repeated.
    live_rows = padded_length if preset.pad_position is None else min(padded_length, num_tokens + 1)
    if max(prompt.input_ids, default=0) >= config.vocab_size:
        raise InvalidField(
            "prompts",
            f"token {max(prompt.input_ids)} is outside the checkpoint's vocabulary of {config.vocab_size}. "
            "The tokenizer does not belong to this checkpoint.",
        )
    return Job(
        input_ids=prompt.input_ids,
        computed_rows=live_rows if preset.padding_rows == "live" else num_tokens,
        delivered_rows=num_tokens if preset.padding_rows == "cut" else padded_length,
        dropped_rows=preset.dropped_rows,
        taps=preset.taps(config.num_hidden_layers),
        combine=preset.combine,
        dtype=dtype,
        tail_rows=prompt.tail_tokens,
        pad_position=preset.pad_position,
        unit_rms=preset.unit_rms,
        bundle=preset.bundle,
    )
