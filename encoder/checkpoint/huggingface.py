"""Reads a Hugging Face folder, single file or sharded, and a diffusers pipeline folder."""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from encoder.checkpoint.checkpoint import Checkpoint
from encoder.checkpoint.fingerprint import fingerprint
from encoder.checkpoint.json_file import read_json_object
from encoder.checkpoint.keys import parameter_name
from encoder.checkpoint.safetensors_files import SafetensorsWeights
from encoder.checkpoint.weights import Weights
from encoder.config import Qwen3Config
from encoder.errors import CheckpointError
from encoder.tokenizer import Tokenizer
from encoder.types import DType

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_DTYPES: dict[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_LISTED = 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Layout:
    """Which folders of a checkpoint hold what."""

    text_encoder: Path
    tokenizer: Path


def open_folder(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    """Describe the checkpoint in `folder`; reads headers, no tensors.

    Args:
        folder: of a Qwen3 model, of a diffusers pipeline, or the `text_encoder` within one.
        name: that the checkpoint was asked for by.
        revision: commit of the hub repository it came from.
    Errors: CheckpointError naming the file and what is wrong with it.
    """
    layout = find_layout(folder)
    raw_config = read_json_object(layout.text_encoder / "config.json")
    config = Qwen3Config.from_dict(raw_config)
    weights = open_weights(layout.text_encoder)
    _refuse_quantized(weights)
    _refuse_absurd_depth(config, weights)
    tokenizer = open_tokenizer(layout.tokenizer)
    _warn_of_larger_vocabulary(tokenizer, config)
    return Checkpoint(
        name=name,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        quantization=None,
        fingerprint=fingerprint(config, weights),
        revision=revision,
        dtype=_stored_dtype(weights),
        random_weights=bool(raw_config.get("random_weights", False)),
    )


def find_layout(folder: Path) -> Layout:
    """Where text encoder and tokenizer are, in a pipeline folder and in a plain one."""
    if (folder / "model_index.json").is_file() or (folder / "text_encoder" / "config.json").is_file():
        text_encoder = folder / "text_encoder"
        if not text_encoder.is_dir():
            raise CheckpointError(
                f"{folder}: this diffusers pipeline has no text_encoder folder. "
                f"Name the Qwen3 checkpoint that it was published to go with."
            )
        candidates = [folder / "tokenizer", folder / "processor", text_encoder]
    else:
        text_encoder = folder
        candidates = [folder, folder.parent / "tokenizer", folder.parent / "processor"]
    with_tokenizer = (candidate for candidate in candidates if (candidate / TOKENIZER_FILE).is_file())
    return Layout(text_encoder, next(with_tokenizer, candidates[0]))


def open_weights(folder: Path) -> SafetensorsWeights:
    """The encoder's tensors in the safetensors files of `folder`.

    Errors: CheckpointError when there are none, or the index names a file or a tensor that is not there.
    """
    if (folder / SINGLE_FILE).is_file():
        return SafetensorsWeights([folder / SINGLE_FILE])
    if (folder / INDEX_FILE).is_file():
        return _open_indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return SafetensorsWeights(files)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: has {', '.join(pickles)}, expected {SINGLE_FILE}. Pickle can run code and is not read; "
            f"convert it once with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)."
        )
    raise CheckpointError(f"{folder}: has no *.safetensors file. Is the download complete?")


def read_index(file: Path) -> dict[str, str]:
    """From the keys of the encoder's tensors to the names of the files that hold them.

    Errors: CheckpointError when the index is damaged, or leads out of its folder.
    """
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is no map of tensors to files, or empty.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or "\\" in name:
            raise CheckpointError(f"{file}: {key} is in {name!r}, expected the name of a file beside it.")
    return {key: name for key, name in weight_map.items() if parameter_name(key) is not None}


def _open_indexed(folder: Path) -> SafetensorsWeights:
    index = read_index(folder / INDEX_FILE)
    files = [folder / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing, but named in {INDEX_FILE}. Fetch them again.")
    weights = SafetensorsWeights(files)
    present = {(tensor.key, tensor.file.name) for tensor in weights.tensors.values()}
    absent = sorted(index.items() - present)
    if absent:
        listed = ", ".join(f"{key} in {name}" for key, name in absent[:_LISTED])
        more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        raise CheckpointError(
            f"{folder / INDEX_FILE}: names {listed}{more}, which is not there. Fetch the files again."
        )
    return weights


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`.

    Errors: CheckpointError when tokenizer.json is missing or damaged, or no padding token is known.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return Tokenizer.from_file(folder / TOKENIZER_FILE, _pad_token(folder / TOKENIZER_CONFIG_FILE))
    if (folder / "vocab.json").is_file():
        raise CheckpointError(
            f"{folder}: has vocab.json, but no {TOKENIZER_FILE}. Convert it once with transformers: "
            f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    raise CheckpointError(f"{folder}: has no {TOKENIZER_FILE}. Copy it there from the model's repository.")


def _pad_token(config_file: Path) -> str | None:
    """`pad_token` of tokenizer_config.json: a string, or an object with the string as `content`."""
    if not config_file.is_file():
        return None
    pad_token = read_json_object(config_file).get("pad_token")
    if isinstance(pad_token, dict):
        pad_token = pad_token.get("content")
    return pad_token if isinstance(pad_token, str) else None


def _refuse_quantized(weights: Weights) -> None:
    for tensor in weights.tensors.values():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{tensor.file.name}: {tensor.key} has dtype {tensor.dtype}, expected {', '.join(_DTYPES)}. "
                f"Quantized weights are not read yet; use the checkpoint in bfloat16."
            )


def _refuse_absurd_depth(config: Qwen3Config, weights: Weights) -> None:
    """A layer has eleven tensors; a config that asks for a layer per tensor would have us build layers for hours."""
    if config.num_hidden_layers > len(weights.tensors):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {config.num_hidden_layers:,}, but the files hold "
            f"{len(weights.tensors):,} tensors of the encoder in all. Is the checkpoint complete?"
        )


def _stored_dtype(weights: Weights) -> DType:
    """The dtype of most bytes: some converters leave the norms in float32."""
    nbytes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        nbytes[tensor.dtype] += tensor.nbytes
    return _DTYPES[nbytes.most_common(1)[0][0]]


def _warn_of_larger_vocabulary(tokenizer: Tokenizer, config: Qwen3Config) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        log.warning(
            "tokenizer.json has %d tokens, expected at most vocab_size %d of config.json: prompts with tokens beyond "
            "it will be refused. Are both from the same model?",
            *(tokenizer.vocab_size, config.vocab_size),
        )
