"""From a checkpoint's key to the parameter's name. The key's prefix depends on the class that was saved.

Qwen3ForCausalLM                  model.layers.…
Qwen3Model, Qwen3VLTextModel      layers.…
Qwen3VLForConditionalGeneration   model.language_model.layers.…, model.visual.…
Qwen3VLModel                      language_model.layers.…, visual.…
mlx-lm, qwen3_vl                  language_model.model.layers.…, vision_tower.…
Ollama's image models             text_encoder/model.layers.…
ComfyUI, all models in one file   text_encoders.qwen3_4b.transformer.model.layers.…, model.diffusion_model.…, vae.…
"""

import re

_COMPONENT = re.compile(r"text_encoder/|(?:(?:text_encoders|cond_stage_model)\.)?\w+\.transformer\.")
_PREFIXES = (  # longest first
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.",
)
_OTHER_MODELS = ("visual.", "vision_tower.", "lm_head.", "diffusion_model.", "vae.", "first_stage_model.")
_NO_PARAMETERS = (
    "rotary_emb.inv_freq",  # RoPE frequencies, which follow from rope_theta
    "scaled_fp8",  # ComfyUI's mark on a file with scale_weight
    ".input_scale",  # of activations, for products in float8
    ".scale_input",
    "logit_scale",
    "tokenizer_json",
)


def parameter_name(key: str) -> str | None:
    """The name of the parameter in `Qwen3`; None for a tensor that the encoder never needs."""
    component = _COMPONENT.match(key)
    name = key[component.end() :] if component else key
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    name = name.removeprefix(prefix)
    return None if name.startswith(_OTHER_MODELS) or name.endswith(_NO_PARAMETERS) else name
