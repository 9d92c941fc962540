"""Which model to load and how. Data only: an option of the model is added here, and to the app's settings."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encoder.presets.preset import Preset

ComputeDType = Literal["auto", "bfloat16", "float32", "float16"]
Quantize = Literal["auto", "keep", "none", "2", "3", "4", "5", "6", "8", "mxfp4", "mxfp8", "nvfp4"]


_SCALE = re.compile(r":(?P<scale>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d\d?)?)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA to merge into the model.

    Attributes:
        source: a folder, a file, or a hub id as `organization/name[/path][@revision]`.
        scale: factor of its strength; 1 is that of its training.
    """

    source: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """From `SOURCE[:SCALE]`. What stands behind the last colon and is no number belongs to the source."""
        match = _SCALE.search(text)
        return cls(text[: match.start()], float(match["scale"])) if match else cls(text)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """A model to load.

    Attributes:
        model: "demo", a folder, a .safetensors or .gguf file, an Ollama name, or a hub id as
            `organization/name[/path][@revision]`.
        revision: branch, tag or commit of a hub repository; None means the default branch.
        cache_dir: folder for downloads and the demo checkpoint; None means the usual place of each.
        tokenizer: a tokenizer.json, a folder with one, or a hub id; None means the checkpoint's own.
        rope_theta: base of RoPE's frequencies: 1000000 for Qwen3, 5000000 for Qwen3-VL; None means the checkpoint's
            own, or what its tensors and names tell.
        component: which Qwen3 to take where a file, folder or pipeline holds several: a folder's name, or a part of the
            prefix of its keys; None expects one.
        quantize: what the weights become in memory. "none" makes floats of all; "keep" keeps stored quantizations that
            MLX has kernels for; "auto" is "keep" on a GPU and "none" on a CPU, whose quantized kernels are some 70
            times slower than float32; a number of bits or a mode quantizes anew.
        compute_dtype: "auto" is float32 on a CPU; on a GPU the checkpoint's own, or bfloat16 for a float16 checkpoint.
        force_float16: allow compute_dtype float16, in which Qwen3 overflows to NaN on ordinary prompts.
        num_layers: decoder layers to load; None means as many as `presets` need. Requests that need more are refused.
        loras: LoRAs to merge into the weights as they are read, in this order.
        presets: all presets that will be asked for; empty means any preset, so that all layers are loaded.
    """

    model: str
    revision: str | None = None
    cache_dir: Path | None = None
    tokenizer: str | None = None
    rope_theta: float | None = None
    component: str | None = None
    quantize: Quantize = "auto"
    compute_dtype: ComputeDType = "auto"
    force_float16: bool = False
    num_layers: int | None = None
    loras: tuple[Lora, ...] = ()
    presets: tuple[Preset, ...] = ()
