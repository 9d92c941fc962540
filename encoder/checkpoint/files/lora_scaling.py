"""What an adapter says of alpha and rank, which scale its updates.

adapter_config.json     PEFT's, and mlx-lm's, which says `scale` in one number
lora_adapter_metadata   the same fields as PEFT's, in the header of diffusers' files
….alpha                 an array of one number, for each module of a kohya file

Where none of them says alpha, it is the rank, as in PEFT, diffusers and ComfyUI.
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from encoder.checkpoint.tensors.json_text import parse_json_object
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError

_PLAIN_PATTERN = re.compile(r"\^?[\w.\\-]+\$?", re.ASCII)
# Fields of PEFT's config that change the result and are not computed here, where they are set.
_UNKNOWN_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that subtract from the base model


@dataclass(frozen=True, slots=True)
class Scaling:
    """What an adapter says of its alpha for all modules, or some.

    Attributes:
        alpha: None where nothing says it.
        alphas: by the end of a module's path, in place of `alpha`.
        rank_stabilized: whether alpha is divided by the square root of the rank.
        factor: alpha by rank, where that is said in one number.
    """

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    factor: float | None = None

    def of(self, path: str, rank: int) -> float:
        """Alpha by rank for the module at `path`."""
        if self.factor is not None:
            return self.factor
        patterns = (alpha for end, alpha in self.alphas.items() if path == end or path.endswith(f".{end}"))
        alpha = next(patterns, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def scaling_in_header(text: str, where: str) -> Scaling:
    """From `lora_adapter_metadata` in the header of the file `where`.

    Errors: CheckpointError when it is damaged, and for a variant of LoRA that is not computed.
    """
    where = f"{where}: lora_adapter_metadata"
    fields = parse_json_object(text, where)
    own = {key.removeprefix("text_encoder."): value for key, value in fields.items() if key.startswith("text_encoder.")}
    return _peft_scaling(own or fields, where)


def scaling_in_config(config: dict[str, Any], where: str) -> Scaling:
    """From adapter_config.json, PEFT's or mlx-lm's, the file `where`. Errors: as of `scaling_in_header`."""
    if "lora_parameters" in config:
        parameters = config["lora_parameters"]
        kind = config.get("fine_tune_type", "lora")
        if kind != "lora" or not isinstance(parameters, dict):
            raise CheckpointError(f"{where}: fine_tune_type is {kind!r:.80}, expected lora. Fuse it with mlx_lm.fuse.")
        return Scaling(factor=_number(parameters.get("scale"), f"{where}: lora_parameters.scale"))
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {kind!r:.80}, expected LORA. Merge the adapter into its model with PEFT's "
            f"merge_and_unload, and give that as --model."
        )
    return _peft_scaling(config, where)


def _peft_scaling(config: Mapping[str, Any], where: str) -> Scaling:
    """Errors: CheckpointError for a variant of LoRA that is not computed here."""
    variants = [name for name in _UNKNOWN_VARIANTS if config.get(name)]
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGES_BASE):
        variants.append(f"init_lora_weights={initialization:.20}")
    if variants:
        raise CheckpointError(
            f"{where}: has {', '.join(variants)}, a variant of LoRA that is not read here. Merge the adapter into its "
            f"model with PEFT's merge_and_unload, and give that as --model."
        )
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_PLAIN_PATTERN.fullmatch, patterns)):
        raise CheckpointError(f"{where}: alpha_pattern is {patterns!r:.80}, expected names of modules.")
    return Scaling(
        None if alpha is None else _number(alpha, f"{where}: lora_alpha"),
        {
            re.sub(r"[\^$\\]", "", end): _number(value, f"{where}: alpha_pattern of {end}")
            for end, value in patterns.items()
        },
        bool(config.get("use_rslora")),
    )


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{where} is {value!r:.80}, expected a number.")
    return float(value)


def read_scalar(array: StoredArray) -> float:
    """The number in an array of one. Errors: CheckpointError when it is not one finite number."""
    layouts = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
    content = array.read_bytes(8)
    if array.dtype == "BF16":
        content, layout = b"\0\0" + content, "<f"  # the upper half of a float32
    else:
        layout = layouts.get(array.dtype, "")
    if math.prod(array.shape) == 1 and layout and len(content) == struct.calcsize(layout):
        [value] = struct.unpack(layout, content)
        if math.isfinite(value):
            return float(value)
    raise CheckpointError(
        f"{array.file}: {array.key:.120} is {array.dtype} {array.shape!s:.80}, expected one finite number."
    )
