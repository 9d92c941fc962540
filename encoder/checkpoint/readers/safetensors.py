"""Describes a model in safetensors files, whoever wrote them: what a folder's reader and a single file's share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoder.checkpoint.checkpoint import Checkpoint, Origin, describe
from encoder.checkpoint.files import tokenizer_limits
from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.files.quantization_files import with_quantization
from encoder.checkpoint.files.safetensors_header import Header
from encoder.checkpoint.files.tokenizer_build import parse_tokenizer_json
from encoder.checkpoint.files.tokenizer_files import find_tokenizer
from encoder.checkpoint.readers.theta import config_from_tensors
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.assemble import Hints, assemble, by_key
from encoder.checkpoint.tensors.encodings import FLOATS
from encoder.checkpoint.tensors.rope_theta import settle_rope_theta
from encoder.checkpoint.tensors.schemes import SCHEMES
from encoder.checkpoint.tensors.weights import StoredArray, Weights
from encoder.pipeline.tokenizer import Tokenizer
from encoder.qwen3.config import Qwen3Config, states_rope_theta


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one model.

    Attributes:
        where: the file or folder that was opened, for messages.
        headers: of all its safetensors files.
        config_file: its config.json; None where there is none.
        tokenizers: folders in which its tokenizer may be, best first.
        component: which Qwen3 of several in the files; None where there is one.
        format: what the files are, for people.
        warnings: of whoever chose the files.
    """

    where: Path
    headers: Sequence[Header]
    config_file: Path | None
    tokenizers: Sequence[Path]
    component: str | None
    format: str
    warnings: tuple[str, ...] = ()


def open_files(files: Files, request: Request) -> Checkpoint:
    """The checkpoint in these files. The dims follow from the tensors' shapes where there is no config.json.

    Errors: CheckpointError naming the file and what is wrong with it.
    """
    arrays = [array for header in files.headers for array in header.arrays]
    metadata = {key: value for header in files.headers for key, value in header.metadata.items()}
    raw_config: dict[str, Any] = {}
    if files.config_file is not None:
        raw_config = with_quantization(read_json_object(files.config_file), files.config_file.parent)
    dims = Qwen3Config.from_dict(raw_config, str(files.config_file)) if files.config_file is not None else None
    hints = Hints(raw_config, metadata, dims)
    assembled = assemble(by_key(arrays), SCHEMES, hints, str(files.where), files.component)
    if dims is None:
        tensors = assembled.tensors
        config, theta = config_from_tensors(files.where, arrays, tensors, assembled.prefix, metadata, request)
    else:
        stated, given = states_rope_theta(raw_config), request.options.rope_theta
        config, theta = settle_rope_theta(dims, str(files.config_file), stated, given)
    warnings = [*files.warnings, *assembled.warnings, *theta.warnings]
    # Two fields that only this package writes, see loading/convert.py.
    random_weights, dtype = raw_config.get("random_weights") is True, raw_config.get("compute_dtype")
    if random_weights:
        warnings.append("its weights are RANDOM; its hidden states mean nothing")
    tokenizer = _tokenizer(files, arrays, config, request)
    origin = Origin(
        format=files.format,
        config=str(files.config_file or "the tensors' shapes, with Qwen3's rms_norm_eps"),
        rope_theta=theta.source,
        tokenizer=tokenizer.source,
    )
    return describe(
        request.name,
        config,
        Weights(assembled.tensors),
        tokenizer,
        origin,
        warnings,
        random_weights=random_weights,
        dtype=dtype if dtype in FLOATS.values() else None,
    )


def _tokenizer(files: Files, arrays: Iterable[StoredArray], config: Qwen3Config, request: Request) -> Tokenizer:
    """The tokenizer that the user named, else the one in the files, else the one beside them, else Qwen3's own."""
    embedded = _embedded_tokenizer(arrays) if request.options.tokenizer is None else None
    return embedded or find_tokenizer(request, files.tokenizers, config.vocab_size)


def _embedded_tokenizer(arrays: Iterable[StoredArray]) -> Tokenizer | None:
    """The tokenizer.json that some files hold as a tensor of bytes, None for the others."""
    for array in arrays:
        if array.key == "tokenizer_json" and array.nbytes <= tokenizer_limits.MAX_BYTES:
            return parse_tokenizer_json(array.read_bytes(tokenizer_limits.MAX_BYTES), f"tokenizer_json in {array.file}")
    return None
