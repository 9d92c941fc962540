"""What every reader of this package yields, whatever format the weights are stored in."""

from collections import Counter
from dataclasses import dataclass

from encoder.checkpoint.tensors.dims import layer_of
from encoder.checkpoint.tensors.fingerprint import fingerprint
from encoder.checkpoint.tensors.weights import StoredTensor, Weights
from encoder.errors import CheckpointError
from encoder.pipeline.tokenizer import Tokenizer
from encoder.qwen3.config import Qwen3Config
from encoder.types import DType


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A text encoder on disk: described and checked, its tensors not yet read.

    Attributes:
        name: as it was asked for: "demo", a path, a hub id, or a name in Ollama's store.
        config: the dims.
        weights: where the tensors are; `load_weights` reads them.
        tokenizer: ready to use.
        quantization: what the stored weights are quantized to, None where they are plain floats.
        fingerprint: of the weights' content, the same wherever and in however many files they lie.
        revision: commit of the hub repository, None for what is local.
        dtype: to compute in where the device likes it: that of most floats; of quantized numbers bfloat16.
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

    def tensors_of(self, num_layers: int) -> list[StoredTensor]:
        """The tensors of the first so many decoder layers, and those that belong to none."""
        left_out = range(num_layers, self.config.num_hidden_layers)
        return [tensor for name, tensor in self.weights.tensors.items() if layer_of(name) not in left_out]


def describe(
    name: str,
    config: Qwen3Config,
    weights: Weights,
    tokenizer: Tokenizer,
    *,
    random_weights: bool = False,
) -> Checkpoint:
    """The checkpoint made of these parts; what follows from the stored tensors is filled in.

    Errors: CheckpointError when there are fewer tensors than layers.
    """
    if config.num_hidden_layers > len(weights.tensors):  # else layers would be built for hours, to be found missing
        raise CheckpointError(
            f"{name}: config.json: num_hidden_layers is {config.num_hidden_layers:,}, but the files hold "
            f"{len(weights.tensors):,} tensors of the encoder in all. Is the checkpoint complete?"
        )
    return Checkpoint(
        name=name,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        quantization=_quantization(weights),
        fingerprint=fingerprint(config, weights.tensors),
        revision=None,
        dtype=_compute_dtype(weights),
        random_weights=random_weights,
    )


def _quantization(weights: Weights) -> str | None:
    """Every quantization in use, that of most bytes first."""
    nbytes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        if tensor.encoding.quantized:
            nbytes[tensor.encoding.label] += tensor.nbytes
    return ", ".join(label for label, _ in nbytes.most_common()) or None


def _compute_dtype(weights: Weights) -> DType:
    """The dtype of most bytes: some converters leave the norms in float32."""
    nbytes: Counter[DType] = Counter()
    for tensor in weights.tensors.values():
        label = tensor.encoding.label
        plain = label == "float32" or label == "float16"
        nbytes[label if plain else "bfloat16"] += tensor.nbytes  # type: ignore[index]
    return nbytes.most_common(1)[0][0] if nbytes else "bfloat16"
