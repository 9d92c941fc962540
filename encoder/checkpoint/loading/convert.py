"""Writes any checkpoint as a folder in MLX's format, with the encoder's tensors alone, quantized or not.

No stored number is rounded unless the user asks for it: floats keep their dtype, and the scales of a quantization that
MLX has, and the weights of one that it has not, are written in the narrowest dtype that holds each of their numbers.
"""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.loading.parameters import Progress, read_parameters
from encoder.checkpoint.loading.residency import Resident, new_quantization, plan_residents
from encoder.checkpoint.tensors.encodings import Plain
from encoder.checkpoint.tensors.lora import Merged
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer
from encoder.scratch import move_into_place, scratch_folder

log = logging.getLogger(__name__)

SHARD_BYTES = 2 * 10**9
_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def convert_checkpoint(
    checkpoint: Checkpoint, folder: Path, quantize: str = "keep", progress: Progress | None = None
) -> None:
    """Write the checkpoint to a new folder. Holds at most one shard of it in memory.

    Args:
        checkpoint: as opened.
        folder: the new folder; it appears when it is complete.
        quantize: "keep" and "auto" keep the quantizations that MLX has too, "none" writes floats of the checkpoint's
            dtype, and anything else is as in ModelOptions.
        progress: called after each tensor.
    Errors: CheckpointError when the folder exists or cannot be written, or a tensor cannot be read. Then, and after any
        other end, nothing is left of it.
    """
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder}: exists already, expected the name of a new folder.")
    residents = _plan(checkpoint, quantize)
    near = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        _check_disk(near, sum(resident.nbytes for resident in residents.values()))
        with scratch_folder(near) as scratch:
            fresh = scratch / "fresh"  # with the permissions of any new folder, which `scratch` has not
            fresh.mkdir()
            _write_weights(fresh, _named(checkpoint, residents, progress))
            _write_json(fresh / "config.json", _config(checkpoint, residents))
            checkpoint.tokenizer.save(fresh / "tokenizer.json")
            _write_json(fresh / "tokenizer_config.json", _tokenizer_config(checkpoint.tokenizer))
            folder.parent.mkdir(parents=True, exist_ok=True)
            move_into_place(fresh, folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    log.info("%s: written to %s", checkpoint.name, folder)


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tokenizer.json does not say; the class is the one that takes that file as it is."""
    named = {} if tokenizer.pad_token is None else {"pad_token": tokenizer.pad_token}
    splits = tokenizer.splits_special_tokens
    return {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": splits, **named}


def _plan(checkpoint: Checkpoint, quantize: str) -> dict[str, Resident]:
    """The form in which each tensor is written. Floats of float32 are then narrowed, see `_narrowed`."""
    keep, dtype = quantize != "none", _DTYPES[checkpoint.dtype]
    planned = plan_residents(checkpoint.weights.tensors.values(), dtype, new_quantization(quantize), keep=keep)
    residents = {name: replace(resident, dtype=_dtype(resident, dtype, keep)) for name, resident in planned.items()}
    decoded = [
        resident
        for resident in residents.values()
        if resident.stored.encoding.quantized and resident.quantization is None and resident.dtype == mx.float32
    ]
    if keep and decoded:
        log.warning(
            "%s: MLX has no form for %d of %d tensors (%s). They are written as floats, of 32 bits where %s would "
            "round them; --quantize none writes %s",
            *(checkpoint.name, len(decoded), len(residents), checkpoint.quantization),
            *(checkpoint.dtype, checkpoint.dtype),
        )
    return residents


def _dtype(resident: Resident, dtype: mx.Dtype, keep: bool) -> mx.Dtype:
    """Of the floats that are written: the stored one; that of the checkpoint for what is new; else float32."""
    encoding = resident.stored.encoding
    if isinstance(encoding, Plain) and resident.quantization is None:
        return _DTYPES[encoding.label]
    is_new = not keep or isinstance(encoding, Merged) or resident.quantization != encoding.mlx_quantization
    return dtype if is_new else mx.float32


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder}: {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free.")


def _named(
    checkpoint: Checkpoint, residents: Mapping[str, Resident], progress: Progress | None
) -> Iterator[tuple[str, mx.array]]:
    plain = {name for name, resident in residents.items() if isinstance(resident.stored.encoding, Plain)}
    for parameters in read_parameters(checkpoint, residents, progress):
        written = parameters if plain.issuperset(parameters) else _narrowed(parameters)
        for name, array in written.items():
            yield f"model.{name}", array


def _narrowed(parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The parameters of one tensor, with those of float32 in the narrowest dtype that holds all of their numbers."""
    floats = {name: array for name, array in parameters.items() if array.dtype == mx.float32}
    for dtype in (mx.bfloat16, mx.float16):
        narrow = {name: array.astype(dtype) for name, array in floats.items()}
        if all(mx.array_equal(narrow[name].astype(mx.float32), floats[name]) for name in floats):
            return {**parameters, **narrow}
    return dict(parameters)


def _write_weights(folder: Path, named: Iterator[tuple[str, mx.array]]) -> None:
    """Write shards and their index, or model.safetensors where one shard is enough."""
    weight_map: dict[str, str] = {}
    shard: dict[str, mx.array] = {}
    files: list[Path] = []

    def flush() -> None:
        files.append(folder / f"model-{len(files) + 1:05}.safetensors")
        mx.eval(shard)
        try:
            mx.save_safetensors(str(files[-1]), shard, {"format": "mlx"})
        except RuntimeError as error:  # with all in memory, it can only be the disk
            raise OSError(str(error).rstrip(".")) from error
        weight_map.update(dict.fromkeys(shard, files[-1].name))
        shard.clear()

    for key, array in named:
        shard[key] = array
        if sum(value.nbytes for value in shard.values()) >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
    else:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _config(checkpoint: Checkpoint, residents: Mapping[str, Resident]) -> dict[str, Any]:
    """A config.json that this package, mlx-lm and transformers understand."""
    config: dict[str, Any] = {
        **asdict(checkpoint.config),
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "model_type": "qwen3",
        "tie_word_embeddings": True,  # no head is written
        "torch_dtype": checkpoint.dtype,
        "compute_dtype": checkpoint.dtype,  # which the written floats may not show
    }
    if checkpoint.random_weights:
        config["random_weights"] = True
    quantized = {name: resident.quantization for name, resident in residents.items() if resident.quantization}
    if quantized:
        [(usual, _)] = Counter(quantized.values()).most_common(1)
        others = {f"model.{name.removesuffix('.weight')}": asdict(q) for name, q in quantized.items() if q != usual}
        config["quantization"] = config["quantization_config"] = asdict(usual) | others
    return config


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
