"""The commands that need no server: encode to a file, list presets, inspect and convert a checkpoint."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from app import wire
from app.reply.reply import collate, is_ragged
from app.settings import Settings, SettingsError
from encoder import (
    Checkpoint,
    Depth,
    DType,
    InvalidField,
    Preset,
    TextEncoder,
    check_preset,
    choose_depth,
    convert_checkpoint,
    move_into_place,
    open_checkpoint,
    scratch_folder,
)

DTYPE_HELP = "dtype of the numbers; bfloat16 by default, for *.npy float32, because NumPy has no bfloat16"


def encode(settings: Settings, prompts: list[str], preset: str | None, dtype: DType | None, output: Path) -> int:
    """Write hidden states and mask to a safetensors file, or the hidden states alone to a NumPy file."""
    numpy_file = _is_numpy_file(output)
    if numpy_file and dtype == "bfloat16":
        raise SettingsError("--dtype bfloat16: NumPy does not have it. Use float32, or write *.safetensors.")
    chosen = settings.catalog.get(preset or None)
    with _complete_file(output) as file:  # first, since a disk that cannot be written need not wait for the model
        encoder = TextEncoder.open(replace(settings.model_options(), presets=(chosen,)))
        embeds = encoder.encode(prompts, chosen, dtype or ("float32" if numpy_file else "bfloat16"))
        if numpy_file and is_ragged(embeds):
            raise SettingsError(
                "*.npy has no mask, and these prompts have different numbers of rows. Use *.safetensors."
            )
        hidden_states, attention_mask = collate(embeds)
        if numpy_file:
            np.save(file, hidden_states.array)
        else:
            tokenized = encoder.tokenize(prompts, chosen)
            document = {
                "model": encoder.info.model,
                "preset": chosen.name,
                "hidden_states": hidden_states,
                "attention_mask": attention_mask,
                "num_tokens": [len(prompt.input_ids) for prompt in tokenized],
                "truncated": [prompt.truncated for prompt in tokenized],
            }
            file.write(wire.pack_safetensors(document))
    print(f"{output}: {hidden_states.dtype} {list(hidden_states.array.shape)}")
    return 0


@contextlib.contextmanager
def _complete_file(output: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when it is complete, and keeps the permissions of the one before.

    Errors: OSError.
    """
    place = output.resolve()  # a link stays, and what it leads to is replaced
    if place.exists() and not place.is_file():  # a device or a pipe
        with place.open("wb", buffering=0) as file:
            yield file
        return
    with scratch_folder(place.parent) as scratch:
        fresh = scratch / "fresh"
        with fresh.open("wb") as file:
            yield file
        if place.exists():
            shutil.copymode(place, fresh)
        move_into_place(fresh, place)


def _is_numpy_file(path: Path) -> bool:
    if path.suffix not in (".npy", ".safetensors"):
        raise SettingsError(f"--output {path}: expected a name that ends in .safetensors or .npy.")
    if path.is_dir():
        raise SettingsError(f"--output {path}: is a folder, expected the name of a file.")
    if not path.parent.is_dir():
        raise SettingsError(f"--output {path}: there is no folder {path.parent}.")
    return path.suffix == ".npy"


def presets(settings: Settings) -> int:
    """Print all presets."""
    rows = [("preset", "window", "padding", "rows", "hidden states", "for")]
    rows += [_preset_row(preset) for preset in settings.catalog]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _preset_row(preset: Preset) -> tuple[str, str, str, str, str, str]:
    taken = (
        f"layers {list(preset.layers)}"
        if preset.layers is not None
        else f"hidden_states {list(preset.hidden_states or ())}"
    )
    names = ", ".join((preset.name, *preset.aliases))
    return (names, str(preset.max_sequence_length), preset.padding, preset.padding_rows, taken, preset.description)


def inspect(settings: Settings) -> int:
    """Print the facts about a checkpoint, the memory it needs, and which presets fit it."""
    checkpoint = open_checkpoint(settings.model_options())
    depth = choose_depth(checkpoint.config, settings.num_layers, settings.restricted_to)
    tensors = checkpoint.tensors_of(depth.layers)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    facts = {
        "checkpoint": checkpoint.name,
        "revision": checkpoint.revision or "none",
        "format": checkpoint.origin.format,
        "config from": checkpoint.origin.config,
        "rope_theta from": checkpoint.origin.rope_theta,
        "tokenizer from": checkpoint.origin.tokenizer,
        "fingerprint": checkpoint.fingerprint,
        "weights": "random, made from a seed" if checkpoint.random_weights else "trained",
        "dtype": checkpoint.dtype,
        "quantization": checkpoint.quantization or "none",
        "loras": ", ".join(f"{lora.source} × {lora.scale:g} in {lora.weights} weights" for lora in checkpoint.loras)
        or "none",
        "layers": f"{depth.layers} of {checkpoint.config.num_hidden_layers} are loaded: {depth.reason}",
        "parameters": f"{parameters:,}",
        "stored": _size(sum(tensor.nbytes for tensor in tensors)),
        "memory": f"{_size(2 * parameters)} in bfloat16, {_size(4 * parameters)} in float32",
        **asdict(checkpoint.config),
    }
    for name, value in facts.items():
        print(f"{name:24}{value}")
    for warning in checkpoint.warnings:
        print(f"{'warning':24}{warning}")
    print("presets:")
    for preset in settings.catalog:
        print(f"  {preset.name:22}{_fit(preset, checkpoint, depth)}")
    return 0


def convert(settings: Settings, folder: Path) -> int:
    """Write a checkpoint's text encoder to a new folder, quantized as the settings say."""
    convert_checkpoint(open_checkpoint(settings.model_options()), folder, settings.quantize)
    print(folder)
    return 0


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _fit(preset: Preset, checkpoint: Checkpoint, depth: Depth) -> str:
    config = checkpoint.config
    try:
        check_preset(preset, config.num_hidden_layers, config.hidden_size, depth.layers, checkpoint.tokenizer.has_token)
    except InvalidField as error:
        return f"does not fit: {error}"
    return "fits"
