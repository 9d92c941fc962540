"""The keys of an adapter: which module of which model, and which part of its update.

Each trainer has its own names for both, in any combination:

PEFT         base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ….lora_A.default.weight
diffusers    text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight, ….lora.down.weight, ….lora_linear_layer.…
kohya        lora_te_layers_0_self_attn_q_proj.lora_down.weight, ….alpha
OneTrainer   text_encoder.model.layers.0.self_attn.q_proj.lora_down.weight
ComfyUI      text_encoders.qwen3_06b.transformer.model.layers.0.self_attn.q_proj.lora_A.weight
LyCORIS      ….hada_w1_a, ….lokr_w1, ….diff, ….w_norm
mlx-lm       model.layers.0.self_attn.q_proj.lora_a
llama.cpp    layers.0.self_attn.q_proj.weight.lora_a, once the module has its name in the model

Underscores for dots cannot be undone by rule. So such a name is looked up among the model's own modules.
Source: peft, utils/save_and_load.py; diffusers, utils/state_dict_utils.py; sd-scripts, networks/lora_anima.py and
convert_anima_lora_to_comfy.py; OneTrainer, modelSetup/QwenLoRASetup.py; ComfyUI, comfy/lora.py; mlx-lm, tuner/lora.py.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from encoder.checkpoint.tensors.lora import Kind

Owner = Literal["this encoder", "the diffusion model", "another text encoder", "the vision tower", "the head"]

_MAX_KEY = 500  # characters
_MAX_END = 120

# How a key ends, and the kind of update that it is a part of.
_ENDS: tuple[tuple[str, Kind], ...] = (
    (r"\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.(?!bias$)[\w-]+)?(\.weight)?", "lora"),
    (r"([._]lora|\.lora_linear_layer)\.(?P<part>down|up)\.weight", "lora"),
    (r"\.weight\.(?P<part>lora_a|lora_b)", "lora"),
    (r"\.lora_(?P<part>down|up|a|b)(\.weight)?", "lora"),
    (r"\.(?P<part>alpha)", "lora"),
    (r"\.hada_(?P<part>w[12]_[ab])", "loha"),
    (r"\.lokr_(?P<part>w[12](_[ab])?)", "lokr"),
    (r"\.(?P<part>diff|diff_b|w_norm|b_norm)", "diff"),
    (r"(\.base_layer|\.modules_to_save\.[\w-]+)?\.(?P<part>weight|bias)", "weight"),
)
_FORMS = tuple((re.compile(rf"{end}\Z"), kind) for end, kind in _ENDS)

# Parts by their names: the parameter, the array's name in an `Update`, and whether it is stored transposed.
_PARTS = {
    "A": ("weight", "down", False),
    "B": ("weight", "up", False),
    "embedding_A": ("weight", "up", True),
    "embedding_B": ("weight", "down", True),
    "magnitude_vector": ("weight", "magnitude", False),
    "a": ("weight", "down", True),
    "b": ("weight", "up", True),
    "lora_a": ("weight", "down", False),
    "lora_b": ("weight", "up", False),
    "w_norm": ("weight", "diff", False),
    "diff_b": ("bias", "diff", False),
    "b_norm": ("bias", "diff", False),
    "bias": ("bias", "weight", False),
}
_PARTS_OF_EMBEDDING = _PARTS | {  # mlx-lm and llama.cpp have other orders there
    "a": ("weight", "up", False),
    "b": ("weight", "down", False),
    "lora_a": ("weight", "up", False),
    "lora_b": ("weight", "down", True),
}

_OTHERS: tuple[tuple[Owner, re.Pattern[str]], ...] = (
    (
        "the diffusion model",
        re.compile(
            r"^((transformer(_2)?|(model\.)?diffusion_model|unet|dit|vae)\.|"
            r"(lora_(unet|transformer|prior_unet)|lycoris)_)"
        ),
    ),
    ("another text encoder", re.compile(r"text_model[._]encoder|text_projection|encoder[._]block[._]")),
    ("the vision tower", re.compile(r"(^|[._])(visual|vision_tower)[._]")),
    ("the head", re.compile(r"(^|[._])lm_head[._]")),
)
_WRAPPERS = re.compile(
    r"((base_model|model|module|_orig_mod|language_model|text_encoder(_[2-4])?|te[1-4]?|text_encoders\.\w+\.transformer)\.)*"
)
_FLAT_WRAPPERS = re.compile(r"lora_(te[1-4]?|text_encoder(_[2-4])?)_((model|language_model)_)*")


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """A key that was understood.

    Attributes:
        module: as the file names it, with all prefixes.
        parameter: "weight" or "bias".
        kind: of the update.
        role: the array's name in an `Update`, or "alpha".
        transposed: whether the array is stored transposed.
    """

    module: str
    parameter: str
    kind: Kind
    role: str
    transposed: bool

    @classmethod
    def parse(cls, key: str) -> "AdapterKey | None":
        """The meaning of a key; None where it has none that is known."""
        if len(key) > _MAX_KEY:
            return None
        for form, kind in _FORMS:
            match = form.search(key, max(1, len(key) - _MAX_END))
            if match is not None:
                module = key[: match.start()]
                parts = _PARTS_OF_EMBEDDING if module.endswith("embed_tokens") else _PARTS
                parameter, role, transposed = parts.get(match["part"], ("weight", match["part"], False))
                return cls(module, parameter, kind, role, transposed)
        return None


def owner_of(key: str) -> Owner:
    """The model that an array belongs to, as far as its key says."""
    return next((owner for owner, pattern in _OTHERS if pattern.search(key[:_MAX_KEY])), "this encoder")


class Modules:
    """The modules of the model, found by the names that trainers give them.

    Args:
        names: of all parameters of the model.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._paths = {name.rpartition(".")[0] for name in names}
        self._flat = {path.replace(".", "_"): path for path in self._paths}

    def find(self, module: str) -> str | None:
        """The path of a module in the model; None where it has no such module."""
        wrappers = _WRAPPERS.match(module)
        path = module[wrappers.end() :] if wrappers else module
        if path in self._paths:
            return path
        flat = _FLAT_WRAPPERS.match(module)
        return self._flat.get(module[flat.end() :]) if flat else None
