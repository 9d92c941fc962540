"""Whether the stored tensors are those of a Qwen3 of given dims: every parameter is there once, and nothing else."""

import re
from collections.abc import Iterable, Mapping

from encoder.checkpoint.tensors.dims import layer_of
from encoder.checkpoint.tensors.weights import StoredTensor
from encoder.errors import CheckpointError
from encoder.messages import listed
from encoder.qwen3.config import Qwen3Config

_MAX_LISTED = 4
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_CAUSES = (  # what a part of an extra key says about its writer
    (
        re.compile(r"\.(base_layer|original_module|modules_to_save)\."),
        "saved with an adapter that is not merged; merge it, or give base and LoRA separately",
    ),
    (
        re.compile(r"qkv_proj|gate_up_proj"),
        "stored with fused matrices, as inference engines do; take the original",
    ),
    (re.compile(r"experts\.|\.gate\.weight$|shared_expert"), "a mixture of experts, which is another model"),
    (re.compile(r"pre_feedforward_layernorm|linear_attn|\.mixer\."), "another model than Qwen3"),
    (re.compile(r"_scale|scales?\b|zero|absmax|qweight|codebook"), "quantized in a way that is not read here"),
)


def parameter_shapes(config: Qwen3Config, num_layers: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of `Qwen3` by name, in its first `num_layers` layers and outside the layers."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width, inner = config.num_key_value_heads * config.head_dim, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (width, hidden),
        "self_attn.k_proj.weight": (kv_width, hidden),
        "self_attn.v_proj.weight": (kv_width, hidden),
        "self_attn.o_proj.weight": (hidden, width),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        layer |= {f"self_attn.{name}_proj.bias": layer[f"self_attn.{name}_proj.weight"][:1] for name in "qkvo"}
    if config.attention_sinks:
        layer["self_attn.sinks"] = (config.num_attention_heads,)
    outside = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    return outside | {f"layers.{n}.{name}": shape for n in range(num_layers) for name, shape in layer.items()}


def check_tensors(
    tensors: Mapping[str, StoredTensor], config: Qwen3Config, num_layers: int, where: str, dims_from: str
) -> None:
    """Return when the first `num_layers` layers, and what belongs to no layer, are complete.

    Args:
        tensors: by parameter name. Those of further layers may be missing.
        config: the dims.
        num_layers: decoder layers that will be loaded.
        where: the checkpoint, for messages.
        dims_from: what the dims were read from, for messages.
    Errors: CheckpointError that counts the tensors that are missing, extra or misshapen, and says why they may be.
    """
    left_out = range(num_layers, config.num_hidden_layers)
    found = {name: tensor for name, tensor in tensors.items() if layer_of(name) not in left_out}
    expected = parameter_shapes(config, num_layers)
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    extra = [f"{tensor.key:.120}" for name, tensor in found.items() if name not in expected]
    misshapen = [
        f"{tensor.key:.120} is {list(tensor.shape)}, expected {list(expected[name])}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name]
    ]
    problems = [
        f"{len(items):,} {kind} ({listed(items, _MAX_LISTED)})"
        for kind, items in (("missing", missing), ("misshapen", misshapen), ("extra", extra))
        if items
    ]
    if problems:
        layers = 1 + max((layer for name in tensors if (layer := layer_of(name)) is not None), default=-1)
        raise CheckpointError(
            f"{where}: its tensors are not those of the Qwen3 that {dims_from} describes: {'; '.join(problems)}. "
            f"{_cause(found.values(), missing, misshapen, extra)}{_layers_differ(config, layers)}"
        )


def _cause(stored: Iterable[StoredTensor], missing: list[str], misshapen: list[str], extra: list[str]) -> str:
    """The likeliest cause, and what to do."""
    files = sorted({tensor.file.name for tensor in stored})
    if missing and len(files) == 1 and _SHARD.search(files[0]):
        return f"{files[0]} is one shard of several: give the folder with all of them and their index."
    said = next((cause for pattern, cause in _CAUSES for key in extra if pattern.search(key)), None)
    if said is not None:
        return f"It seems to be {said}."
    if misshapen:
        return "Are the dims and the weights of the same model?"
    return "Is the checkpoint complete? Fetch it again." if missing else "Is it a Qwen3 of another kind?"


def _layers_differ(config: Qwen3Config, layers: int) -> str:
    if layers == config.num_hidden_layers:
        return ""
    return f" It has tensors of {layers:,} layers, and num_hidden_layers is {config.num_hidden_layers:,}."
