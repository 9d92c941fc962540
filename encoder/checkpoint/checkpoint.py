"""A checkpoint: what every reader returns, whatever format it reads."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from encoder.checkpoint.tensors.dims import layer_of
from encoder.checkpoint.tensors.encodings import Plain
from encoder.checkpoint.tensors.fingerprint import fingerprint
from encoder.checkpoint.tensors.weights import StoredTensor, Weights
from encoder.errors import CheckpointError
from encoder.messages import one_line
from encoder.pipeline.tokenizer import Tokenizer
from encoder.qwen3.config import Qwen3Config
from encoder.types import DType, MergedLora

_PAD_TOKEN = "<|endoftext|>"  # of Qwen3, and of all built-in presets


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the parts of a checkpoint came from, as texts for people.

    Attributes:
        format: of the weights.
        config: what the dims were read from.
        rope_theta: what says the base of RoPE, or why it was assumed.
        tokenizer: which tokenizer it is.
    """

    format: str
    config: str
    rope_theta: str
    tokenizer: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A text encoder on disk, described and checked. Its tensors are not read yet.

    Attributes:
        name: as the user named it: "demo", a path, a hub id, or a name in Ollama's store.
        config: the dims.
        weights: where the tensors are; `load_weights` reads them.
        tokenizer: ready to use.
        quantization: of the stored weights; None where they are plain floats.
        fingerprint: of the weights' content. It does not depend on where they are stored, nor in how many files.
        revision: commit of the hub repository; None for a local checkpoint.
        dtype: the checkpoint's own compute dtype: as stated, else that of most stored bytes, where quantized numbers
            count as bfloat16.
        random_weights: True where the weights are not trained, so that the hidden states mean nothing.
        loras: that are merged into the weights, in this order.
        origin: where its parts came from.
        warnings: what was assumed or left out, each in a sentence.
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
    origin: Origin
    warnings: tuple[str, ...]
    loras: tuple[MergedLora, ...] = ()

    def tensors_of(self, num_layers: int) -> list[StoredTensor]:
        """The tensors of the first `num_layers` decoder layers, and those that belong to no layer."""
        left_out = range(num_layers, self.config.num_hidden_layers)
        return [tensor for name, tensor in self.weights.tensors.items() if layer_of(name) not in left_out]


def describe(
    name: str,
    config: Qwen3Config,
    weights: Weights,
    tokenizer: Tokenizer,
    origin: Origin,
    warnings: Sequence[str] = (),
    *,
    random_weights: bool = False,
    dtype: DType | None = None,
) -> Checkpoint:
    """The checkpoint made of these parts. Quantization, fingerprint and dtype follow from the stored tensors.

    Args:
        name: as the user named it.
        config: the dims.
        weights: the tensors, by the names of the model's parameters.
        tokenizer: the checkpoint's, or the one that the user named.
        origin: where these parts came from.
        warnings: what was assumed or left out.
        random_weights: whether the weights are not trained.
        dtype: the compute dtype, where the checkpoint states it.
    Errors: CheckpointError when there are fewer tensors than layers, or more tokens than the vocabulary has.
    """
    # Else all the layers that config.json claims would be built, for hours, before their tensors are found missing.
    if config.num_hidden_layers > len(weights.tensors):
        raise CheckpointError(
            f"{name}: num_hidden_layers is {config.num_hidden_layers:,} in {origin.config}, but the files hold "
            f"{len(weights.tensors):,} tensors of the encoder in all. Is the checkpoint complete?"
        )
    _check_tokenizer(name, config, tokenizer)
    return Checkpoint(
        name=name,
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        quantization=_quantization(weights),
        fingerprint=fingerprint(config, weights.tensors),
        revision=None,
        dtype=dtype or _compute_dtype(weights),
        random_weights=random_weights,
        origin=origin,
        warnings=tuple(map(one_line, (*warnings, *_padding_warnings(tokenizer)))),
    )


def _check_tokenizer(name: str, config: Qwen3Config, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size:,} tokens, expected at most the {config.vocab_size:,} of "
            f"the model's vocabulary. Give the tokenizer that belongs to the model with --tokenizer."
        )


def _padding_warnings(tokenizer: Tokenizer) -> list[str]:
    """Presets pad with their own token, so a checkpoint's other one changes nothing."""
    if tokenizer.pad_token in (None, _PAD_TOKEN):
        return []
    return [
        f"its tokenizer names the padding token {tokenizer.pad_token!r:.80}; presets pad with their own, {_PAD_TOKEN}"
    ]


def _quantization(weights: Weights) -> str | None:
    """Every quantization in use, that of most bytes first; None where all tensors are floats."""
    nbytes: Counter[str] = Counter()
    for tensor in weights.tensors.values():
        if tensor.encoding.quantized:
            nbytes[tensor.encoding.label] += tensor.nbytes
    return ", ".join(label for label, _ in nbytes.most_common()) or None


def _compute_dtype(weights: Weights) -> DType:
    """The dtype of most bytes. Some converters leave the norms in float32."""
    nbytes: Counter[DType] = Counter()
    for tensor in weights.tensors.values():
        nbytes[tensor.encoding.label if isinstance(tensor.encoding, Plain) else "bfloat16"] += tensor.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else "bfloat16"
