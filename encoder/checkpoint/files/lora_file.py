"""Finds and opens an adapter: the file that holds its arrays, and what says how they are scaled."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILES,
    MODEL_SUFFIXES,
    PICKLE_SUFFIXES,
    is_adapter_folder,
    model_files,
    snapshot_of,
)
from encoder.checkpoint.files.lora_scaling import Scaling, scaling_in_config, scaling_in_header
from encoder.checkpoint.files.safetensors_header import read_header
from encoder.checkpoint.tensors.weights import StoredArray
from encoder.errors import CheckpointError
from encoder.messages import listed

_ALPHA_IN_CONFIG = re.compile(r"^base_model\.|\.lora_[ab]$")  # keys of PEFT and of mlx-lm


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
    if file.suffix.lower() in PICKLE_SUFFIXES:
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
        return Adapter(file, header.arrays, scaling_in_header(header.metadata["lora_adapter_metadata"], str(file)))
    keys = [array.key for array in header.arrays]
    if any(key.endswith(".alpha") for key in keys):
        return Adapter(file, header.arrays, Scaling())
    expects_config = any(map(_ALPHA_IN_CONFIG.search, keys))
    if config.is_file() and (expects_config or file.name in ADAPTER_FILES):  # in a folder may lie files of others, too
        fields = read_json_object(config)
        if fields.get("use_dora") and not any("magnitude" in key for key in keys):
            raise CheckpointError(f"{file}: has no magnitudes, but use_dora is set in {config}. Is it complete?")
        return Adapter(file, header.arrays, scaling_in_config(fields, str(config)))
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
    pickles = [file for suffix in PICKLE_SUFFIXES for file in model_files(folder, suffix)]
    if pickles:
        return pickles[0]
    raise CheckpointError(f"{folder}: holds no LoRA, expected {ADAPTER_FILES[0]} or another *.safetensors.")


def _candidates(folder: Path) -> list[Path]:
    """The files of a folder that may be the adapter: one of the usual names, first, or any file of a model's suffix."""
    usual = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    return usual or [file for suffix in MODEL_SUFFIXES for file in model_files(folder, suffix)]
