"""How ComfyUI lays out the conditioning of each system: data. The sources are files in its comfy/text_encoders."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class System:
    """The layout of one system, (1, rows, features) float32, and what stands beside it.

    Attributes:
        source: the file that says so.
        fills_window: ComfyUI pads as the preset does, up to its window; else there are rows of real tokens only.
        attention_mask: whether the conditioning has one, (1, rows) int64. Some systems drop it where it is all ones.
        stacked: the service stacks hidden states behind the rows, (1, rows, n, D); ComfyUI flattens them to n * D.
        whole_templates: a prompt that begins with <|im_start|> is its own template.
        dropped: whether rows in front are dropped, which such a prompt makes impossible.
        empty: where the preset replaces an empty prompt and ComfyUI does not, the template's end, sent as the prompt.
        extra: what else stands beside it.
    """

    source: str
    fills_window: bool = False
    attention_mask: bool = True
    stacked: bool = False
    whole_templates: bool = False
    dropped: bool = False
    empty: str | None = None
    extra: Literal["minimax_token_tags", "t5xxl"] | None = None


KLEIN = System("flux.py", fills_window=True)  # features are the layers 8, 17 and 26, one after the other
Z_IMAGE = System("z_image.py")

SYSTEMS: dict[str, System] = {
    "flux2-klein": KLEIN,
    "z-image": Z_IMAGE,
    "krea-2": System("krea2.py", attention_mask=False, stacked=True, whole_templates=True, dropped=True),
    "qwen-image-2.1": System(
        "qwen_image21.py",
        attention_mask=False,
        whole_templates=True,
        dropped=True,
        empty="<|im_end|>\n<|im_start|>assistant\n",
    ),
    "ideogram-4": System("ideogram4.py", whole_templates=True),  # as its text-only checkpoint: layer 35 is un-normed
    "comfyui/ideogram-4": System("ideogram4.py", whole_templates=True),  # as with a whole Qwen3-VL-8B
    "boogu": System("boogu.py", whole_templates=True),
    "mage-flow": System("mage_flow.py", attention_mask=False, whole_templates=True, dropped=True),
    "joyimage-edit": System("joyimage.py", whole_templates=True, dropped=True),
    "nucleus-image": System("nucleus_image.py"),
    "ovis-image": System("ovis.py", fills_window=True, attention_mask=False),
    "anima": System("anima.py", extra="t5xxl"),
    "minimax-h3": System("minimax.py", attention_mask=False, extra="minimax_token_tags"),
    "ollama/flux2-klein": KLEIN,  # ComfyUI has neither: for pictures as Ollama makes them
    "ollama/z-image": System("z_image.py", fills_window=True),
}
