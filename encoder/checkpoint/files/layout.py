"""Which folders and files a checkpoint consists of, in the file system and in a hub repository.

Reads the index of sharded weights and that of a pipeline, and opens nothing else.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from encoder.checkpoint.files.json_file import read_json_object
from encoder.checkpoint.tensors.keys import find_encoder
from encoder.errors import CheckpointError
from encoder.messages import listed
from encoder.regular_file import open_file, read_file

CONFIG_FILE = "config.json"
QUANTIZATION_FILES = (  # of some quantizers, beside a config.json that may not speak of the quantization
    "hf_quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
)
WEIGHTS_FILE = "model.safetensors"  # where the weights are in one file
INDEX_FILE = "model.safetensors.index.json"  # where they are in several
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_MAP_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"  # of a slow tokenizer, in place of tokenizer.json
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    ADDED_TOKENS_FILE,
    VOCAB_FILE,
    MERGES_FILE,
)
PIPELINE_FILE = "model_index.json"  # of a diffusers pipeline
ADAPTER_CONFIG_FILE = "adapter_config.json"  # of a LoRA in a folder
ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors")  # its weights

TEXT_ENCODER_FOLDERS = ("text_encoder", "mllm", "text_encoder_2")  # of a diffusers pipeline, as are the next
TOKENIZER_FOLDERS = ("tokenizer", "processor")

MODEL_SUFFIXES = (".safetensors", ".gguf")  # of checkpoints in a single file; a hub id may end in one
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")  # of weights that are not read
SHARD_NAME = re.compile(r"(?P<before>.*-)\d{5}-of-(?P<count>\d{5})(?P<after>.*\.safetensors)", re.DOTALL)

_NAME = re.compile(r"\w[\w.-]*")  # of a pipeline's folder: nothing that leads out of it
_MAX_NAME_BYTES = 4096  # of a commit
_HUB_FOLDER = re.compile(r"models--(?P<organization>.+?)--(?P<name>.+)")


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder of a checkpoint's config.json and weights, and those in which its tokenizer may be, best first.

    Attributes:
        component: what `--component` still has to choose among the models in the weights; None where it names the
            folder, or was not given.
    """

    text_encoder: Path
    tokenizers: tuple[Path, ...]
    component: str | None


def find_layout(folder: Path, component: str | None = None) -> Layout:
    """Where text encoder and tokenizer are, in a diffusers pipeline and in the folder of a single model.

    Args:
        folder: of either, or a repository's folder in the hub's cache.
        component: the folder of the text encoder in a pipeline; None looks for it.
    Errors: CheckpointError for a pipeline without a Qwen3 text encoder, or with several.
    """
    folder = snapshot_of(_folder_of_model(folder))
    if component is not None and (folder / component).is_dir() and component == Path(component).name:
        return _component_layout(folder, component, None)
    names = _text_encoders_of(folder)
    if len(names) > 1:
        raise CheckpointError(
            f"{folder}: has several Qwen3 text encoders; choose one: --component {names[0]}, "
            f"or one of {', '.join(names[1:])}."
        )
    if names:
        return _component_layout(folder, names[0], component)
    return Layout(folder, (folder, *(folder.parent / name for name in TOKENIZER_FOLDERS)), component)


def _component_layout(folder: Path, name: str, component: str | None) -> Layout:
    beside = dict.fromkeys([name.replace("text_encoder", "tokenizer"), *TOKENIZER_FOLDERS, name])
    return Layout(folder / name, tuple(folder / place for place in beside), component)


def _text_encoders_of(folder: Path) -> list[str]:
    """The folders of the text encoders of a pipeline that may be a Qwen3; empty where `folder` is no pipeline."""
    components = read_json_object(folder / PIPELINE_FILE) if (folder / PIPELINE_FILE).is_file() else {}
    named = (name for name, value in components.items() if _names_qwen3(value) and _NAME.fullmatch(name))
    qwen3 = [name for name in named if (folder / name).is_dir()]
    if qwen3:
        return qwen3
    inner = sorted(TEXT_ENCODER_FOLDERS, key=lambda name: not _describes_qwen3(folder / name))
    inner = [name for name in inner if (folder / name).is_dir()]
    if components and not inner:
        raise CheckpointError(
            f"{folder}: this diffusers pipeline has no text_encoder folder. "
            f"Name the Qwen3 checkpoint that it was published to go with."
        )
    return [name for name in inner if components or _holds_model(folder / name)][:1]


def _names_qwen3(component: object) -> bool:
    """Whether an entry of model_index.json, like ["transformers", "Qwen3ForCausalLM"], is of a Qwen3."""
    return isinstance(component, list) and len(component) == 2 and str(component[1]).startswith("Qwen3")


def _describes_qwen3(folder: Path) -> bool:
    """Whether the config of a folder is a Qwen3's; beside it, a pipeline may have a CLIP or T5 in another."""
    file = folder / CONFIG_FILE
    return file.is_file() and str(read_json_object(file).get("model_type")).startswith("qwen3")


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or any(model_files(folder, ".safetensors"))


def _folder_of_model(folder: Path, levels: int = 2) -> Path:
    """The folder itself if a model is in it, else the only folder within it that has one, else the folder itself.

    Errors: CheckpointError when several folders within it have a model.
    """
    if not folder.is_dir() or (folder / CONFIG_FILE).is_file() or _is_of_model(folder):
        return folder
    visible = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    inner = [path for path in visible if os.access(path, os.R_OK | os.X_OK)]  # a disk has a lost+found
    models = [path for path in inner if _is_of_model(path)]
    if len(models) > 1:
        raise CheckpointError(
            f"{folder}: holds no model, but has folders that do. Name one: {listed(path.name for path in models)}."
        )
    if not models and len(inner) == 1 and levels > 1:  # organization/name
        models = [path for path in [_folder_of_model(inner[0], levels - 1)] if _is_of_model(path)]
    return models[0] if models else folder


def _is_of_model(folder: Path) -> bool:
    """Whether there are weights in `folder`, or it is a pipeline, or a repository of the hub's cache."""
    return (
        any((folder / name).is_file() for name in (PIPELINE_FILE, INDEX_FILE))
        or any((folder / name).is_dir() for name in TEXT_ENCODER_FOLDERS)
        or _is_of_hub_cache(folder)
        or any(model_files(folder, suffix) for suffix in MODEL_SUFFIXES)
    )


def _is_of_hub_cache(folder: Path) -> bool:
    return _HUB_FOLDER.fullmatch(folder.name) is not None and (folder / "snapshots").is_dir()


def snapshot_of(folder: Path) -> Path:
    """The snapshot that a repository's folder in the hub's cache stands for; any other folder itself.

    Errors: CheckpointError when the folder has no snapshot, or several and no main branch.
    """
    match = _HUB_FOLDER.fullmatch(folder.name)
    if match is None or not _is_of_hub_cache(folder):
        return folder
    branch = folder / "refs" / "main"
    commit = read_file(branch, _MAX_NAME_BYTES).decode(errors="replace").strip() if branch.is_file() else ""
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    named = [path for path in snapshots if path.name == commit] or snapshots
    if len(named) != 1:
        raise CheckpointError(
            f"{folder}: is a repository's folder in the hub's cache, with {len(named)} snapshots. Give the id "
            f"{match['organization']}/{match['name']}, or one folder of {folder / 'snapshots'}."
        )
    return named[0]


def model_files(folder: Path, suffix: str) -> list[Path]:
    """The files of `folder` whose names end in `suffix`, in order.

    Hidden ones are left out: macOS writes `._NAME` beside NAME on file systems of others.
    """
    found = (file for file in folder.iterdir() if file.suffix.lower() == suffix and not file.name.startswith("."))
    return sorted(file for file in found if file.is_file())  # opening a pipe would hang


def is_adapter_folder(folder: Path) -> bool:
    """Whether `folder` holds a LoRA and no model. Trainers put config.json and the tokenizer beside a LoRA, too."""
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return False
    weights = {file.name for suffix in MODEL_SUFFIXES for file in model_files(folder, suffix)}
    return weights <= {*ADAPTER_FILES} and (bool(weights) or not (folder / CONFIG_FILE).is_file())


def is_there(file: Path) -> bool:
    """Whether there is such a file. Errors: CheckpointError for a link whose target is missing.

    Taken for absent, a config.json that leads nowhere would be made up from the tensors.
    """
    if file.is_file():
        return True
    if file.is_symlink() and not file.exists():
        raise CheckpointError(
            f"{file}: is a link to {os.readlink(file)}, which does not exist. Fetch the model again, or copy it with "
            f"the files that its links lead to (cp -L)."
        )
    if file.exists():  # a folder, a pipe, a device: read as a file to say which
        open_file(file).close()
    return False


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in `folder`: a tokenizer.json, or the two files of a slow one."""
    return is_there(folder / TOKENIZER_FILE) or all((folder / name).is_file() for name in (VOCAB_FILE, MERGES_FILE))


def first_with_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The first of `folders` that has a tokenizer.json, else the first that has a slow tokenizer; None if none has one.

    In a pipeline, vocab.json and merges.txt may be those of another text encoder.
    """
    fast = (folder for folder in folders if is_there(folder / TOKENIZER_FILE))
    return next(chain(fast, filter(has_tokenizer, folders)), None)


def read_index(file: Path, component: str | None = None) -> dict[str, str]:
    """From the keys of the encoder's tensors to the names of the files that hold them.

    Errors: CheckpointError when the index is damaged, names a file outside its own folder, or has no Qwen3 or several.
    """
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map is no map of tensors to files, or empty.")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or "\\" in name:
            raise CheckpointError(f"{file}: {key:.80} is in {name!r:.80}, expected the name of a file beside it.")
    names = find_encoder(weight_map, str(file), component).names
    return {key: weight_map[key] for key in names}
