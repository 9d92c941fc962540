"""What every reader of this package yields, whatever format the weights are stored in. Data only."""

from dataclasses import dataclass

from encoder.checkpoint.weights import Weights
from encoder.config import Qwen3Config
from encoder.tokenizer import Tokenizer
from encoder.types import DType


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A text encoder on disk: described and checked, its tensors not yet read.

    Attributes:
        name: as it was asked for: "demo", a path, or a hub id.
        config: the dims.
        weights: where the tensors are; `load_weights` reads them.
        tokenizer: ready to use.
        quantization: what the stored weights are quantized to, None where they are plain floats.
        fingerprint: of the weights' content, the same wherever and in however many files they lie.
        revision: commit of the hub repository, None for a local folder.
        dtype: that most of the stored numbers have.
        random_weights: True where nobody trained them, so that the hidden states mean nothing.
    """

    name: str
    config: Qwen3Config
    weights: Weights
    tokenizer: Tokenizer
    quantization: str | None
    fingerprint: str
    revision: str | None
    dtype: DType
    random_weights: bool
