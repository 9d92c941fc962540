"""How a GGUF file describes RoPE, in the words of config.json.

Source: llama.cpp, src/llama-model.cpp:load_hparams, src/llama-context.cpp, ggml/src/ggml-cpu/ops.cpp:rope_yarn, and
conversion/base.py, which writes YaRN's fields from config.json.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.qwen3.fields import Fields
from encoder.qwen3.rope import yarn_attention_factor

_FREQUENCY_FACTORS = "rope_freqs.weight"  # one divisor for each pair of a head, as Llama 3 has
_MAX_HEAD_BYTES = 2**16


def gguf_rope_scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The `rope_scaling` of a config.json that says the same; None for plain RoPE.

    A factor without a type is linear, and 0 stands for no factor. `attn_factor` multiplies YaRN's own attention factor,
    and `yarn_attn_factor`, which is config.json's attention_factor, replaces it.

    Args:
        rope: the metadata below `qwen3.rope.`, by the rest of the key.
        where: the file, for messages.
    Errors: CheckpointError for settings that are no numbers, or have no counterpart in config.json.
    """
    given = Fields({key: value or None for key, value in rope.items()}, where)
    kind = given.get("scaling.type", "linear")
    factor = given.number("scaling.factor", given.number("scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind != "yarn":
        return {"rope_type": kind, "factor": factor}
    if given.number("scaling.yarn_ext_factor", 1.0) != 1:
        raise given.wrong("scaling.yarn_ext_factor", "1")
    mscale_all_dim = given.get("scaling.yarn_log_multiplier")
    own = yarn_attention_factor(factor, *((1.0, given.number("scaling.yarn_log_multiplier")) if mscale_all_dim else ()))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": given.get("scaling.original_context_length"),
        "attention_factor": given.number("scaling.yarn_attn_factor", own) * given.number("scaling.attn_factor", 1.0),
        "beta_fast": given.get("scaling.yarn_beta_fast"),
        "beta_slow": given.get("scaling.yarn_beta_slow"),
    }


def check_frequency_factors(arrays: Sequence[StoredArray], where: str) -> None:
    """Errors: CheckpointError where the file holds factors on RoPE's frequencies that change them."""
    for array in arrays:
        if array.key != _FREQUENCY_FACTORS:
            continue
        ones = struct.pack("<f", 1.0) * (array.nbytes // 4)
        if array.dtype != "F32" or array.nbytes > _MAX_HEAD_BYTES or array.read_bytes(_MAX_HEAD_BYTES) != ones:
            raise CheckpointError(
                f"{where}: {array.key} changes RoPE's frequencies as Llama 3 does, expected a Qwen3 without it."
            )
