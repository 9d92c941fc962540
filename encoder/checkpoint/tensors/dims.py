"""The dims of a model, and how they follow from the names and shapes of its tensors."""

import re
from collections.abc import Mapping

from encoder.checkpoint.tensors.families import QWEN3_VL_THETA
from encoder.checkpoint.tensors.weights import StoredTensor
from encoder.errors import CheckpointError
from encoder.qwen3.config import Qwen3Config

_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The decoder layer that a parameter belongs to; None for the embedding and the final norm."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def columns_of(config: Qwen3Config, path: str) -> int | None:
    """The width of the matrix at a module's path; None for a module that Qwen3 does not have."""
    module = path.rpartition(".")[2]
    if module == "o_proj":
        return config.num_attention_heads * config.head_dim
    if module == "down_proj":
        return config.intermediate_size
    inputs = ("embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return config.hidden_size if module in inputs else None


def config_from_shapes(tensors: Mapping[str, StoredTensor], where: str, rope_theta: float) -> Qwen3Config:
    """The dims that follow from the tensors' shapes. rms_norm_eps, which no shape shows, is Qwen3's.

    Args:
        tensors: of the encoder, by parameter name.
        where: the file, for messages.
        rope_theta: see rope_theta.py; no shape shows it.
    Errors: CheckpointError naming the tensor that a Qwen3 has and this does not.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            found = f"shape {tensors[name].shape}" if name in tensors else "nothing"
            raise CheckpointError(f"{where}: {name}: found {found}, expected {rank} dims. Is this a Qwen3 encoder?")
        return tensors[name].shape

    [head_dim] = shape("layers.0.self_attn.q_norm.weight", 1)
    vocab_size, hidden_size = shape("embed_tokens.weight", 2)
    if not head_dim:
        raise CheckpointError(f"{where}: layers.0.self_attn.q_norm.weight is empty, expected the size of a head.")
    return Qwen3Config.from_dict(
        {
            "model_type": "qwen3",
            "hidden_size": hidden_size,
            "intermediate_size": shape("layers.0.mlp.gate_proj.weight", 2)[0],
            "num_hidden_layers": 1 + max(layer for name in tensors if (layer := layer_of(name)) is not None),
            "num_attention_heads": shape("layers.0.self_attn.q_proj.weight", 2)[0] // head_dim,
            "num_key_value_heads": shape("layers.0.self_attn.k_proj.weight", 2)[0] // head_dim,
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "rms_norm_eps": 1e-6,
            "rope_theta": rope_theta,
            "attention_bias": "layers.0.self_attn.q_proj.bias" in tensors,
            "max_position_embeddings": 262144 if rope_theta == QWEN3_VL_THETA else 40960,
        },
        where,
    )
