"""Tokenized prompts in, jobs out: which rows run through the model and which are delivered.

Applies a preset's padding, layers and combination to each prompt of a request. Knows nothing of tensors.
"""

from collections.abc import Sequence

from encoder.errors import InvalidField
from encoder.pipeline.tokenizer import Tokenizer
from encoder.presets.preset import Preset, check_preset
from encoder.qwen3.config import Qwen3Config
from encoder.types import DType, Job, TokenizedPrompt


def plan_jobs(
    prompts: Sequence[TokenizedPrompt],
    preset: Preset,
    dtype: DType,
    tokenizer: Tokenizer,
    config: Qwen3Config,
    num_layers: int,
) -> list[Job]:
    """What must be computed for the prompts of one request: a job for each, in their order.

    Args:
        prompts: of one request; some presets pad all of them to the longest.
        preset: what the request asks for.
        dtype: of the results.
        tokenizer: the checkpoint's; it knows the padding token.
        config: the checkpoint's dims.
        num_layers: decoder layers that are loaded.
    Errors: InvalidField when the preset does not fit the checkpoint, or a token is outside its vocabulary.
    """
    check_fit(preset, tokenizer, config, num_layers)
    pad_token_id = tokenizer.token_id(preset.pad_token) or 0
    lengths = padded_lengths([len(prompt.input_ids) for prompt in prompts], preset)
    return [
        _job(prompt, padded_length, pad_token_id, preset, dtype, config)
        for prompt, padded_length in zip(prompts, lengths, strict=True)
    ]


def check_fit(preset: Preset, tokenizer: Tokenizer, config: Qwen3Config, num_layers: int) -> None:
    """Return if the preset fits the checkpoint. Errors: InvalidField naming the layer, the dim or the token."""
    check_preset(preset, config.num_hidden_layers, config.hidden_size, num_layers, tokenizer.has_token)


def padded_lengths(num_tokens: Sequence[int], preset: Preset) -> list[int]:
    """The length of each prompt of one request after the preset's padding, in tokens."""
    longest = {"own": 0, "longest": max(num_tokens), "max_length": preset.max_sequence_length}[preset.padding]
    multiple = preset.pad_to_multiple_of
    rounded = [-(-max(longest, n, preset.min_length) // multiple) * multiple for n in num_tokens]
    return [min(n, preset.max_sequence_length) for n in rounded] if preset.padding == "own" else rounded


def _job(
    prompt: TokenizedPrompt, padded_length: int, pad_token_id: int, preset: Preset, dtype: DType, config: Qwen3Config
) -> Job:
    num_tokens = len(prompt.input_ids)
    # Padding rows that share one position are equal: one is computed and repeated.
    live_rows = padded_length if preset.pad_position is None else min(padded_length, num_tokens + 1)
    if max(prompt.input_ids, default=0) >= config.vocab_size:
        raise InvalidField(
            "prompts",
            f"token {max(prompt.input_ids)} is outside the checkpoint's vocabulary of {config.vocab_size}. "
            "The tokenizer does not belong to this checkpoint.",
        )
    computed_rows = live_rows if preset.padding_rows == "live" else num_tokens
    return Job(
        input_ids=prompt.input_ids,
        computed_rows=computed_rows,
        delivered_rows=num_tokens if preset.padding_rows == "cut" else padded_length,
        dropped_rows=preset.dropped_rows,
        taps=preset.taps(config.num_hidden_layers),
        combine=preset.combine,
        dtype=dtype,
        tail_rows=prompt.tail_tokens,
        pad_position=preset.pad_position,
        pad_token_id=pad_token_id if computed_rows > num_tokens else 0,
        unit_rms=preset.unit_rms,
        bundle=preset.bundle,
    )
