"""From a checkpoint's key to the parameter's name. The prefix depends on the class that was saved.

Qwen3ForCausalLM                  model.layers.…
Qwen3Model, Qwen3VLTextModel      layers.…
Qwen3VLForConditionalGeneration   model.language_model.layers.…, model.visual.…
Qwen3VLModel                      language_model.layers.…, visual.…
mlx-lm, qwen3_vl                  language_model.model.layers.…, vision_tower.…
Ollama's image models             text_encoder/model.layers.…
"""

_COMPONENT = "text_encoder/"
_PREFIXES = (  # longest first
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "model.",
)
_NOT_OURS = ("visual.", "vision_tower.", "lm_head.")


def parameter_name(key: str) -> str | None:
    """The name that a checkpoint's key has in `Qwen3`, or None for a tensor that the encoder never needs."""
    name = key.removeprefix(_COMPONENT)
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    name = name.removeprefix(prefix)
    # Old checkpoints store the RoPE frequencies, which follow from rope_theta.
    if name.startswith(_NOT_OURS) or name.endswith("rotary_emb.inv_freq"):
        return None
    return name
