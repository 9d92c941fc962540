"""Which of a checkpoint's keys are the encoder's, and the parameters' names.

A key is a prefix and a name. The prefix depends on the class that was saved and on what was wrapped around it:

Qwen3ForCausalLM                  model.layers.…
Qwen3Model, Qwen3VLTextModel      layers.…
Qwen3VLForConditionalGeneration   model.language_model.layers.…, model.visual.…
mlx-lm, qwen3_vl                  language_model.model.layers.…, vision_tower.…
torch.compile, DDP, PEFT          _orig_mod.model.layers.…, module.model.layers.…, base_model.model.model.layers.…
Ollama's image models             text_encoder/model.layers.…
ComfyUI, all models in one file   text_encoders.qwen3_4b.transformer.model.layers.…, model.diffusion_model.…, vae.…

So no prefix is listed here: it is what stands before `layers.0.self_attn.q_norm.weight`. What PyTorch wraps around
single layers stands within a name, `layers.0._checkpoint_wrapped_module.mlp.…`, and is left out of it.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from encoder.errors import CheckpointError
from encoder.messages import listed

_WRAPPERS = r"(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)*"
_ANCHOR = re.compile(
    rf"(?P<prefix>(?:.*[./])?)layers\.\d+\.{_WRAPPERS}self_attn\.{_WRAPPERS}q_norm\.{_WRAPPERS}weight", re.DOTALL
)
_WITHIN = re.compile(rf"(?<=\.){_WRAPPERS}")
_OWN = ("embed_tokens.", "layers.", "norm.")  # what stands below the prefix of a Qwen3
_HEAD = "lm_head."
_EMBEDDING = "embed_tokens."
_ADAPTER = re.compile(r"\blora_\w+|\b(hada|lokr)_\w+|\.(alpha|dora_scale)$")
_EXPECTED_BESIDE = re.compile(  # other parts of a whole model, and other models in one file: no warning counts them
    r"(^|[./])(lm_head|visual|vision_\w+|audio_\w+|multi_modal_projector|diffusion_model|vae|first_stage_model|"
    r"text_encoders|cond_stage_model|logit_scale|tokenizer_json|scaled_fp8|mtp|rotary_emb)([./]|$)"
)
# Of activations, for products in 8 bits and a cache of keys and values: ModelOpt, TensorRT-LLM, compressed-tensors,
# Quark, vLLM, AutoFP8, FBGEMM, quanto. A weight's own scales are called otherwise, and so is `pre_quant_scale`.
_ACTIVATION = r"(input|output|act|activation|q|k|v|kv|qkv|kv_cache|prob|prob_output)"
_NO_PARAMETERS = re.compile(
    r"(rotary_emb\.\w+"  # RoPE's frequencies, and tables of them, which follow from rope_theta
    r"|scaled_fp8"  # ComfyUI's mark on a file with scale_weight
    rf"|\.{_ACTIVATION}_(scale|scale_inv|scale_ub|global_scale|zero_point|amax|scaling_factor)"
    r"|\.[kv]_cache\.(scale|zero_point)"
    r"|\.scale_input"
    r"|\.(input|output|softmax|[qkv]_bmm)_quantizer\._amax"
    r")$"
)
# Where ACE-Step 1.5 is one file, it holds the encoder and a language model that plans the music. ComfyUI,
# comfy/text_encoders/ace15.py:ACE15TEModel.
_ENCODER, _LANGUAGE_MODELS = "qwen3_06b", ("qwen3_2b", "qwen3_4b")
_MAX_SHOWN, _MAX_LISTED = 3, 10

# What a key says about a model that people take for the encoder, in this order.
_OTHER_MODELS = (
    (
        re.compile(r"(^|\.)(diffusion_model|double_blocks|transformer_blocks|noise_refiner|cap_embedder)\."),
        "a denoiser",
    ),
    (re.compile(r"\.SelfAttention\.[qkvo]\."), "T5"),
    (re.compile(r"text_model\.encoder\.layers\."), "CLIP"),
    (re.compile(r"(encoder|decoder)\.(conv_in|conv_out|mid_block|up_blocks|downsamples)\b"), "a VAE"),
    (re.compile(r"\.linear_attn\."), "Qwen3.5 or Qwen3-Next"),
    (re.compile(r"\.self_attn\.q_proj\.bias$"), "Qwen2.5 or its VL"),
    (re.compile(r"\.self_attn\.q_proj\."), "another language model, such as Llama or Mistral"),
)


@dataclass(frozen=True, slots=True)
class EncoderKeys:
    """The keys of one text encoder among all keys of a checkpoint.

    Attributes:
        prefix: what stands before the parameters' names.
        names: from each key of the encoder to the parameter's name.
        unneeded: keys that nobody expects beside a text encoder, and that are not read.
        adapter: keys of a LoRA beside the model, which are not read either.
        left_out: the prefix of another Qwen3 beside it; None where there is none, or the user chose between them.
    """

    prefix: str
    names: Mapping[str, str]
    unneeded: tuple[str, ...] = ()
    adapter: tuple[str, ...] = ()
    left_out: str | None = None

    @property
    def warnings(self) -> list[str]:
        """What a user should know about the keys that are not read."""
        said = []
        if self.left_out is not None:
            said.append(f"of two Qwen3, {self.prefix} is taken for the encoder; --component takes {self.left_out}")
        if self.adapter:
            said.append(
                f"a LoRA beside the model is not applied: {_counted(self.adapter, 'tensor')}. Where it is not merged "
                f"yet, give it with --lora"
            )
        if self.unneeded:
            said.append(f"a text encoder does not need, and does not read, {_counted(self.unneeded, 'tensor')}")
        return said


def find_encoder(keys: Iterable[str], where: str, component: str | None = None) -> EncoderKeys:
    """The keys of the Qwen3 among `keys`.

    Args:
        keys: of all tensors of a checkpoint, which may hold other models.
        where: the file or folder, for messages.
        component: which Qwen3 to take where there are several: a part of its prefix; None expects one.
    Errors: CheckpointError when there is no Qwen3, or several to choose from.
    """
    keys = list(keys)
    prefix, left_out = _choose_prefix(keys, where, component)
    names = {key: name for key in keys if (name := _name_below(prefix, key)) is not None}
    if not any(name.startswith(_EMBEDDING) for name in names.values()):
        names |= _tied_embedding(keys, prefix)
    others = [key for key in keys if key not in names and not _NO_PARAMETERS.search(key)]
    adapter = [key for key in others if _ADAPTER.search(key)]
    unneeded = [key for key in others if not _EXPECTED_BESIDE.search(key) and not _ADAPTER.search(key)]
    return EncoderKeys(prefix, names, tuple(unneeded), tuple(adapter), left_out)


def _name_below(prefix: str, key: str) -> str | None:
    """The parameter's name; None for a key that is not the encoder's, or that the encoder never needs."""
    name = _WITHIN.sub("", key[len(prefix) :]) if key.startswith(prefix) else ""
    return None if not name.startswith(_OWN) or _NO_PARAMETERS.search(name) or _ADAPTER.search(name) else name


def _tied_embedding(keys: Collection[str], prefix: str) -> dict[str, str]:
    """A head that stands for the embedding: of two tied weights, some writers keep the head alone."""
    parts = re.findall(r"[^./]*[./]", prefix)
    for count in range(len(parts), -1, -1):  # the head stands beside the encoder, or beside what the encoder is in
        head = "".join(parts[:count]) + _HEAD
        found = {key: _EMBEDDING + key.removeprefix(head) for key in keys if key.startswith(head)}
        if found:
            return found
    return {}


def _choose_prefix(keys: Collection[str], where: str, component: str | None) -> tuple[str, str | None]:
    """The encoder's prefix, and that of another Qwen3 which was left out without being asked to."""
    prefixes = sorted({match["prefix"] for key in keys if (match := _ANCHOR.fullmatch(key))})
    if len(prefixes) > 1:  # a draft or MTP head has layers and no embedding
        whole = [prefix for prefix in prefixes if any(key.startswith(prefix + _EMBEDDING) for key in keys)]
        prefixes = whole or prefixes
    if not prefixes:
        raise CheckpointError(f"{where}: {_explain_no_qwen3(keys)}")
    if component is not None:
        named = [prefix for prefix in prefixes if _has_part(prefix, component)]
        if len(named) != 1:
            raise CheckpointError(f"{where}: --component {component:.80} {_one_of(prefixes)}")
        return named[0], None
    if len(prefixes) == 1:
        return prefixes[0], None
    encoders = [prefix for prefix in prefixes if _has_part(prefix, _ENCODER)]
    planners = [prefix for prefix in prefixes if any(_has_part(prefix, name) for name in _LANGUAGE_MODELS)]
    if len(prefixes) == 2 and len(encoders) == len(planners) == 1:
        return encoders[0], planners[0]
    raise CheckpointError(f"{where}: holds several Qwen3 models; choose one: --component {_one_of(prefixes)}")


def _has_part(prefix: str, component: str) -> bool:
    """Whether the component is the prefix, or whole parts of it."""
    separated = "." + re.sub(r"[./]+", ".", prefix).strip(".") + "."
    return "." + re.sub(r"[./]+", ".", component).strip(".") + "." in separated


def _one_of(prefixes: list[str]) -> str:
    """The components, each by the parts that tell it from the others."""
    parts = [[part for part in re.split(r"[./]", prefix) if part] for prefix in prefixes]
    common = set.intersection(*map(set, parts)) if parts else set()
    own = [".".join(part for part in one if part not in common) or ".".join(one) or "''" for one in parts]
    return f"is one of {listed(own, _MAX_LISTED)}."


def _explain_no_qwen3(keys: Collection[str]) -> str:
    if any(_ADAPTER.search(key) for key in keys):
        return (
            "holds a LoRA adapter and no model. Give the model that it was trained on as --model, and this as --lora."
        )
    shown = ", ".join(f"{key:.80}" for key in list(keys)[:_MAX_SHOWN]) or "no tensor"
    seems = next((model for pattern, model in _OTHER_MODELS if any(map(pattern.search, keys))), None)
    guess = f"It seems to be {seems}. " if seems else ""
    return (
        f"holds no Qwen3: no key ends in layers.0.self_attn.q_norm.weight; its {len(keys):,} tensors begin with "
        f"{shown}. {guess}Give a checkpoint of Qwen3 or of Qwen3-VL."
    )


def _counted(keys: Collection[str], noun: str) -> str:
    shown = listed((f"{key:.80}" for key in keys), _MAX_SHOWN)
    return f"{len(keys):,} {noun}{'s' if len(keys) > 1 else ''} ({shown})"
