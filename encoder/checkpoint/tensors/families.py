"""The models of the name Qwen3, by rope_theta, which no shape shows, and the words that tell them apart. Data only.

Sources: the models' config.json on the hub, the presets' sources, ComfyUI comfy/text_encoders/llama.py.
"""

import re
from dataclasses import dataclass

QWEN3_THETA, QWEN3_VL_THETA = 1e6, 5e6


@dataclass(frozen=True, slots=True)
class Word:
    """A word in a name, and the rope_theta of the models that it stands for."""

    pattern: re.Pattern[str]
    theta: float
    model: str


def _word(pattern: str, theta: float, model: str) -> Word:
    """A pattern that no letter precedes or follows, in which `_` stands for any separators or none."""
    return Word(re.compile(rf"(?<![a-z])(?:{pattern.replace('_', '[^a-z0-9]*')})(?![a-z])"), theta, model)


def _systems(names: str, theta: float, model: str) -> tuple[Word, ...]:
    return tuple(_word(name, theta, model) for name in names.split())


# The first of these that is in a name says which model the name means.
MODELS = (
    _word(r"qwen_3_vl|vl", QWEN3_VL_THETA, "Qwen3-VL"),
    _word(r"qwen_3.*(?<!\d)2507(?!\d)", QWEN3_VL_THETA, "Qwen3-2507"),  # Qwen3-4B-Instruct-2507 and -Thinking-2507
    _word(r"qwen_3(?![.\d])", QWEN3_THETA, "Qwen3"),  # not Qwen3.5
)
SYSTEMS = (
    *_systems(
        r"z_image zeta_chroma flux_2(?!\d) klein ovis anima hdm ace_step ace_1_5 diffsynth_music", QWEN3_THETA, "Qwen3"
    ),
    *_systems(
        r"krea ideogram flux_3(?!\d) qwen_image fibo dream_lite joy_image joy_ai mage_flow boogu nucleus(?:moe)? prx "
        r"minimax_h_3 lingbot se_fi iris",
        QWEN3_VL_THETA,
        "Qwen3-VL",
    ),
)
QWEN3_SYSTEMS = "Z-Image, FLUX.2 klein, Ovis-Image, Anima, ACE-Step"  # for messages
QWEN3_VL_SYSTEMS = "Krea 2, Ideogram 4, FLUX.3, Qwen-Image-2.1, Fibo 2 and most others"

# hidden_size and intermediate_size of the models that there are as Qwen3 alone.
ONLY_QWEN3 = {(1024, 3072): "Qwen3-0.6B", (5120, 17408): "Qwen3-14B"}
# Vocabularies that no Qwen3-VL has. The 151,669 of other Qwen3-Embedding is that of any model cut to its tokenizer.
VOCABULARIES = {151_665: "Qwen3-Embedding-4B and 8B", 217_204: "ACE-Step's language model"}
