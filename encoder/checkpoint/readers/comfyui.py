"""Reads a single safetensors file, as ComfyUI's folder models/text_encoders holds them: no config, no tokenizer.

The dims follow from the shapes. rope_theta, which no shape shows, is assumed, and the log says so: it is Qwen3-VL's
where a key or the file's name says VL, else Qwen3's.
Source: ComfyUI, comfy/sd.py:detect_te_model, comfy/text_encoders/llama.py.
"""

import logging
import re
from pathlib import Path

import tokenizers

from encoder.checkpoint.checkpoint import Checkpoint, describe
from encoder.checkpoint.files.layout import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from encoder.checkpoint.files.safetensors_header import Header, read_header
from encoder.checkpoint.files.tokenizer_files import find_tokenizer, warn_of_larger_vocabulary
from encoder.checkpoint.readers.huggingface import open_folder
from encoder.checkpoint.request import Request
from encoder.checkpoint.tensors.assemble import Hints, assemble
from encoder.checkpoint.tensors.dims import config_from_shapes
from encoder.checkpoint.tensors.families import QWEN3_THETA, QWEN3_VL_THETA
from encoder.checkpoint.tensors.schemes import SCHEMES
from encoder.checkpoint.tensors.weights import StoredArray, Weights
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_QWEN3_KEY = "layers.0.self_attn.q_norm.weight"  # no other text encoder has a tensor of this name
_VISION_KEYS = re.compile(r"(^|\.)(visual|language_model)\.")
_VISION_FILE_NAME = re.compile(r"(^|[^a-z])vl([^a-z]|$)|qwen_?-?3_?-?vl", re.IGNORECASE)
_MAX_TOKENIZER_BYTES = 64 * 2**20


def recognizes(request: Request) -> bool:
    """A file whose name ends in .safetensors."""
    return request.is_file(".safetensors")


def open_request(request: Request) -> Checkpoint:
    """Describe the checkpoint in a file, or the whole folder's where the file belongs to a Hugging Face folder.

    Errors: CheckpointError naming the file and what is wrong with it.
    """
    file, folder = request.path, request.path.parent
    if (folder / CONFIG_FILE).is_file() and (file.name == WEIGHTS_FILE or (folder / INDEX_FILE).is_file()):
        return open_folder(folder, request)
    header = read_header(file)
    tensors = assemble(_encoder_arrays(header, file), SCHEMES, Hints(metadata=header.metadata))
    rope_theta = _assume_rope_theta(file, header)
    config = config_from_shapes(tensors, file.name, rope_theta)
    tokenizer = _embedded_tokenizer(header) if request.options.tokenizer is None else None
    if tokenizer is None:
        places = [file.with_suffix(""), folder, folder / "tokenizer", folder.parent / "tokenizer"]
        tokenizer = find_tokenizer(request, places, config.vocab_size)
    warn_of_larger_vocabulary(tokenizer, config.vocab_size)
    return describe(request.name, config, Weights(tensors), tokenizer)


def _encoder_arrays(header: Header, file: Path) -> list[tuple[str, StoredArray]]:
    """The encoder's arrays, under their keys without the encoder's prefix. A file may hold other models beside it."""
    prefixes = {array.key.removesuffix(_QWEN3_KEY) for array in header.arrays if array.key.endswith(_QWEN3_KEY)}
    if len(prefixes) > 1:
        raise CheckpointError(f"{file}: holds several Qwen3 models, under {', '.join(sorted(prefixes))}, expected one.")
    prefix = prefixes.pop() if prefixes else ""
    return [(array.key.removeprefix(prefix), array) for array in header.arrays if array.key.startswith(prefix)]


def _assume_rope_theta(file: Path, header: Header) -> float:
    vision = any(map(_VISION_KEYS.search, (array.key for array in header.arrays))) or _VISION_FILE_NAME.search(
        file.name
    )
    rope_theta = QWEN3_VL_THETA if vision else QWEN3_THETA
    kind = "Qwen3-VL" if vision else "Qwen3"
    log.info("%s: holds no config; taken to be %s, so rope_theta is %g", file.name, kind, rope_theta)
    return rope_theta


def _embedded_tokenizer(header: Header) -> Tokenizer | None:
    """The tokenizer.json that some files hold as a tensor of bytes, None for the others."""
    for array in header.arrays:
        if array.key == "tokenizer_json" and array.nbytes <= _MAX_TOKENIZER_BYTES:
            try:
                return Tokenizer(tokenizers.Tokenizer.from_buffer(array.read_bytes(_MAX_TOKENIZER_BYTES)))
            except Exception as error:  # the library raises nothing narrower
                raise CheckpointError(f"{array.file}: tokenizer_json cannot be read: {error}") from error
    return None
