"""A Qwen3 text encoder in MLX: prompts in, the hidden states that diffusion models are conditioned on out.

These are the public names. `TextEncoder` is synchronous; `Engine` serves many callers from one event loop.
"""

from encoder.qwen3.cpu.blas import Blas, activate

activate()  # before anything imports mlx.core, which binds cblas_sgemm to whatever is loaded by then

from encoder.checkpoint import Checkpoint, convert_checkpoint, open_checkpoint  # noqa: E402
from encoder.checkpoint.loading.memory import available_bytes  # noqa: E402
from encoder.distribution import Distribution  # noqa: E402
from encoder.errors import (  # noqa: E402
    CheckpointError,
    DeadlineExceeded,
    EncoderError,
    InvalidField,
    ModelFailure,
    NotReady,
    Overloaded,
    PresetFileError,
    QueueFull,
    RequestError,
    RequestTooLarge,
)
from encoder.options import ComputeDType, Lora, ModelOptions, Quantize  # noqa: E402
from encoder.pipeline.limits import Limits  # noqa: E402
from encoder.presets.built_in import BUILT_IN, LAST_HIDDEN_STATE, PRESETS, get_preset  # noqa: E402
from encoder.presets.catalog import Catalog  # noqa: E402
from encoder.presets.preset import Preset, check_preset  # noqa: E402
from encoder.presets.preset_file import read_presets  # noqa: E402
from encoder.qwen3.depth import Depth, choose_depth  # noqa: E402
from encoder.regular_file import read_file  # noqa: E402
from encoder.scratch import move_into_place, scratch_folder  # noqa: E402
from encoder.serving.deadline import Deadline, RequestStage  # noqa: E402
from encoder.serving.engine import Engine  # noqa: E402
from encoder.serving.state import StateName  # noqa: E402
from encoder.text_encoder import TextEncoder  # noqa: E402
from encoder.types import (  # noqa: E402
    CachePolicy,
    Combine,
    DType,
    EncodeResult,
    EngineStats,
    MergedLora,
    ModelInfo,
    Pass,
    PromptEmbeds,
    TokenizedPrompt,
)

__all__ = [
    "BUILT_IN",
    "LAST_HIDDEN_STATE",
    "PRESETS",
    "Blas",
    "CachePolicy",
    "Catalog",
    "Checkpoint",
    "CheckpointError",
    "Combine",
    "ComputeDType",
    "DType",
    "Deadline",
    "DeadlineExceeded",
    "Depth",
    "Distribution",
    "EncodeResult",
    "EncoderError",
    "Engine",
    "EngineStats",
    "InvalidField",
    "Limits",
    "Lora",
    "MergedLora",
    "ModelFailure",
    "ModelInfo",
    "ModelOptions",
    "NotReady",
    "Overloaded",
    "Pass",
    "Preset",
    "PresetFileError",
    "PromptEmbeds",
    "Quantize",
    "QueueFull",
    "RequestError",
    "RequestStage",
    "RequestTooLarge",
    "StateName",
    "TextEncoder",
    "TokenizedPrompt",
    "activate",
    "available_bytes",
    "check_preset",
    "choose_depth",
    "convert_checkpoint",
    "get_preset",
    "move_into_place",
    "open_checkpoint",
    "read_file",
    "read_presets",
    "scratch_folder",
]
