"""What a preset can say, and where it takes hidden states in a given model. The presets are in built_in.py."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from encoder.errors import InvalidField
from encoder.types import Combine, PaddingRows, Tap


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How one diffusion system turns a prompt into prompt embeds.

    Attributes:
        name: as in requests. `aliases` name the same preset.
        description: one line for people.
        source: the code that this preset reproduces.
        prefix, suffix: the tokenized string is prefix + prompt + suffix, always tokenized whole.
        tail: a string that is tokenized apart and stands behind the padding.
        empty_prefix: the prefix of a blank prompt, where it is another.
        empty_prompt: what takes the place of an empty prompt.
        add_special_tokens: whether the tokenizer's post-processor runs; it does nothing in plain Qwen3.
        max_sequence_length: the window, in tokens, the tail included.
        overlong: what is longer than the window is "cut" on the right, or the request is "refused".
        padding: "max_length" pads to the window, "longest" to the longest prompt of a request, "own" each by itself
            and never beyond the window.
        pad_to_multiple_of: the padded length is rounded up to a multiple of this.
        min_length: the padded length is at least this.
        padding_rows: what becomes of padding rows: "cut" removes them, "zero" delivers zeros, "live" delivers the
            hidden states that the model computes there.
        pad_position: position of every padding row, where positions don't run on; only with live padding rows.
        layers: 0-based decoder layers, un-normed; negative counts from the end.
        hidden_states: Hugging Face's index instead: 0 is the embedding output, -1 is after the final norm.
            Exactly one of the two is given.
        combine: "concat" joins features layer after layer, "interleave" feature after feature; "stack" adds an axis in
            front of the rows, "stack_rows" behind them.
        unit_rms: scale each row of each hidden state to a root mean square of 1, in float32.
        bundle: so many consecutive hidden states are joined on their features before `combine`.
        dropped_rows: rows dropped in front.
        negative_prompt: what the system encodes when no negative prompt is given; None where it has no negative.
        negative_preset: the preset that encodes negatives, where it is another.
        hidden_size: of the only checkpoint size that fits, or None where any does.
    """

    name: str
    description: str
    source: str
    aliases: tuple[str, ...] = ()
    prefix: str = ""
    suffix: str = ""
    tail: str = ""
    empty_prefix: str | None = None
    empty_prompt: str = ""
    add_special_tokens: bool = True
    max_sequence_length: int = 512
    overlong: Literal["cut", "refused"] = "cut"
    padding: Literal["longest", "max_length", "own"] = "longest"
    pad_to_multiple_of: int = 1
    min_length: int = 0
    padding_rows: PaddingRows = "cut"
    pad_position: int | None = None
    layers: tuple[int, ...] | None = None
    hidden_states: tuple[int, ...] | None = None
    combine: Combine = "concat"
    unit_rms: bool = False
    bundle: int = 1
    dropped_rows: int = 0
    negative_prompt: str | None = ""
    negative_preset: str | None = None
    hidden_size: int | None = None

    def taps(self, num_hidden_layers: int) -> tuple[Tap, ...]:
        """The places in a model of `num_hidden_layers` layers where this preset takes hidden states.

        Errors: InvalidField when an index does not exist there, or not exactly one of the two numberings is given.
        """
        return _taps(self.layers, self.hidden_states, num_hidden_layers)

    def depth(self, num_hidden_layers: int) -> int:
        """Decoder layers that must run. Errors: as of `taps`."""
        return max(tap.depth for tap in self.taps(num_hidden_layers))


@lru_cache(maxsize=256)  # a request asks several times, and most ask for the same
def _taps(
    layers: tuple[int, ...] | None, hidden_states: tuple[int, ...] | None, num_hidden_layers: int
) -> tuple[Tap, ...]:
    if (layers is None) == (hidden_states is None):
        raise InvalidField("layers", "give exactly one of layers and hidden_states.")
    if layers is not None:
        return tuple(_layer_tap(index, num_hidden_layers) for index in layers)
    return tuple(_hidden_state_tap(index, num_hidden_layers) for index in hidden_states or ())


def _layer_tap(index: int, num_hidden_layers: int) -> Tap:
    layer = index + num_hidden_layers if index < 0 else index
    if not 0 <= layer < num_hidden_layers:
        raise InvalidField(
            "layers",
            f"{index} does not exist; this checkpoint has {num_hidden_layers} decoder layers, "
            f"so allowed are {-num_hidden_layers} to {num_hidden_layers - 1}.",
        )
    return Tap(depth=layer + 1, normed=False)


def _hidden_state_tap(index: int, num_hidden_layers: int) -> Tap:
    depth = index + num_hidden_layers + 1 if index < 0 else index
    if not 0 <= depth <= num_hidden_layers:
        raise InvalidField(
            "hidden_states",
            f"{index} does not exist; this checkpoint has {num_hidden_layers} decoder layers, "
            f"so allowed are {-num_hidden_layers - 1} to {num_hidden_layers}.",
        )
    return Tap(depth=depth, normed=depth == num_hidden_layers)


def check_preset(preset: Preset, num_hidden_layers: int, hidden_size: int, num_layers: int | None = None) -> None:
    """Refuse a preset that does not fit a checkpoint of these dims, of which `num_layers` are loaded; None means all.

    Errors: InvalidField saying which layer or dim does not fit.
    """
    depth = preset.depth(num_hidden_layers)
    if num_layers is not None and depth > num_layers:
        raise InvalidField(
            "layers" if preset.layers is not None else "hidden_states",
            f"{preset.name} needs {depth} decoder layers, and {num_layers} of {num_hidden_layers} were loaded. "
            f"Load more of them.",
        )
    if preset.hidden_size not in (None, hidden_size):
        raise InvalidField(
            "preset",
            f"{preset.name} expects a checkpoint of hidden_size {preset.hidden_size}, this one has {hidden_size}. "
            f"Serve the checkpoint that belongs to it.",
        )
