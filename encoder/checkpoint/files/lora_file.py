"""Finds and opens an adapter: the file that holds its arrays, and what is written beside them of alpha and rank.

adapter_config.json     PEFT's, beside adapter_model.safetensors, and mlx-lm's, beside adapters.safetensors
lora_adapter_metadata   the same fields as PEFT's, in the header of diffusers' files
….alpha                 an array of one number, for each module of a kohya file

Where none of them says alpha, it is the rank, as in PEFT, diffusers and ComfyUI.
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILES,
    MODEL_SUFFIXES,
    is_adapter_folder,
    model_files,
    snapshot_of,
)
from encoder.checkpoint.files.safetensors_header import read_header
from encoder.checkpoint.tensors.json_text import parse_json_object
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.messages import listed

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ALPHA_IN_CONFIG = re.compile(r"^base_model\.|\.lora_[ab]$")  # keys of PEFT and of mlx-lm
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


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk. Its arrays are not read yet.

    Attributes:
        file: that holds the arrays.
        arrays: under the keys that its trainer gave them.
        scaling: from the file's header, or the config beside it.
        warnings: what was assumed.
    """

    file: Path
    arrays: list[StoredArray]
    scaling: Scaling
    warnings: tuple[str, ...] = ()


def find_adapter(path: Path) -> Path:
    """The file of an adapter: `path` itself, the one beside the config that it is, or the one in the folder that it is.

    Errors: CheckpointError when there is none, or several, or a pickle.
    """
    if path.name == ADAPTER_CONFIG_FILE:
        path = path.parent
    file = _file_in(snapshot_of(path)) if path.is_dir() else path
    if file.suffix.lower() in _PICKLES:
        raise CheckpointError(
            f"{file}: is a pickle, which can run code and is not read. Save the LoRA as safetensors, once: "
            f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=True), 'lora.safetensors')."
        )
    return file


def open_adapter(file: Path) -> Adapter:
    """Open an adapter in a safetensors file.

    Errors: CheckpointError when it is damaged, of another format, or of a kind that is not computed.
    """
    header = read_header(file)
    config = file.parent / ADAPTER_CONFIG_FILE
    if "lora_adapter_metadata" in header.metadata:
        return Adapter(file, header.arrays, _scaling_in_header(header.metadata["lora_adapter_metadata"], str(file)))
    keys = [array.key for array in header.arrays]
    if any(key.endswith(".alpha") for key in keys):
        return Adapter(file, header.arrays, Scaling())
    expects_config = any(map(_ALPHA_IN_CONFIG.search, keys))
    if config.is_file() and (expects_config or file.name in ADAPTER_FILES):  # in a folder may lie files of others, too
        fields = read_json_object(config)
        if fields.get("use_dora") and not any("magnitude" in key for key in keys):
            raise CheckpointError(f"{file}: has no magnitudes, but use_dora is set in {config}. Is it complete?")
        return Adapter(file, header.arrays, _scaling_in_config(fields, str(config)))
    warning = f"{file}: no {config.name} lies beside it to say alpha, which is taken to be the rank"
    return Adapter(file, header.arrays, Scaling(), (warning,) if expects_config else ())


def expect_no_adapter(path: Path, name: str) -> None:
    """Return where `path` may be a model.

    Args:
        path: of what was given as the model.
        name: as the user named it.
    Errors: CheckpointError where it is a LoRA. It says how to give that, and names the model that it belongs to.
    """
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        return
    config = (path if path.is_dir() else path.parent) / ADAPTER_CONFIG_FILE
    is_adapter = is_adapter_folder(path) if path.is_dir() else path.name in (config.name, *ADAPTER_FILES)
    if not is_adapter or not config.is_file():
        return
    fields = read_json_object(config)
    base = next((fields[key] for key in ("base_model_name_or_path", "model") if isinstance(fields.get(key), str)), "")
    raise CheckpointError(
        f"{name}: is a LoRA and no model. Give the model that it was trained on, and the LoRA beside it: "
        f"--model {base[:200] or 'MODEL'} --lora {name}"
    )


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


def _file_in(folder: Path) -> Path:
    found = _candidates(folder)
    if len(found) == 1 or (found and found[0].name in ADAPTER_FILES):
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder}: holds {len(found)} files, {listed(file.name for file in found)}. Name the one that is the LoRA."
        )
    inner = sorted(config.parent for config in folder.glob(f"*/{ADAPTER_CONFIG_FILE}"))
    if len(inner) == 1:  # PEFT saves an adapter that has a name in a folder of that name
        return _file_in(inner[0])
    if inner:
        raise CheckpointError(
            f"{folder}: holds {len(inner)} LoRAs. Name one of its folders: {listed(map(str, inner))}."
        )
    pickles = [file for suffix in _PICKLES for file in model_files(folder, suffix)]
    if pickles:
        return pickles[0]
    raise CheckpointError(f"{folder}: holds no LoRA, expected {ADAPTER_FILES[0]} or another *.safetensors.")


def _candidates(folder: Path) -> list[Path]:
    """The files of a folder that may be the adapter: one of the usual names, first, or any file of a model's suffix."""
    usual = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    return usual or [file for suffix in MODEL_SUFFIXES for file in model_files(folder, suffix)]


def _scaling_in_header(text: str, where: str) -> Scaling:
    where = f"{where}: lora_adapter_metadata"
    fields = parse_json_object(text, where)
    own = {key.removeprefix("text_encoder."): value for key, value in fields.items() if key.startswith("text_encoder.")}
    return _peft_scaling(own or fields, where)


def _scaling_in_config(config: dict[str, Any], where: str) -> Scaling:
    """From adapter_config.json, PEFT's or mlx-lm's."""
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
