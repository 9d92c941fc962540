"""What a preset can say, where it takes hidden states in a given model, and whether it fits one.

The presets themselves are in built_in/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from encoder.errors import InvalidField
from encoder.types import Combine, PaddingRows, Tap


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How one diffusion system turns a prompt into prompt embeds.

    Attributes:
        name: the name in requests.
        description: one line for people.
        source: the code that this preset reproduces: project, file and function.
        aliases: other names of the same preset.
        prefix, suffix: the template. The string prefix + prompt + suffix is tokenized as a whole.
        tail: the end of the template where it is tokenized separately and placed behind the padding.
        empty_prefix: the prefix of a blank prompt; None if it is `prefix`.
        empty_prompt: the text that replaces an empty prompt.
        add_special_tokens: whether the checkpoint's tokenizer adds its own tokens; plain Qwen3's has none to add.
        closing_token: the token that the system's own tokenizer adds behind every text, in place of what the
            checkpoint's adds; "" if it adds none. None leaves it to the checkpoint's tokenizer.
        max_sequence_length: the window: the maximum number of tokens, template and tail included.
        overlong: a prompt longer than the window is "cut" on the right together with its template, or its request is
            "refused"; "cut_prompt" cuts the prompt alone, and therefore tokenizes it apart from its template, with no
            token that the tokenizer adds.
        padding: "max_length" pads to the window, "longest" to the longest prompt of the request, "own" pads each
            prompt by itself, by the two fields that follow, and never beyond the window.
        pad_to_multiple_of: the padded length is rounded up to a multiple of this, in tokens.
        min_length: the minimum of the padded length, in tokens.
        padding_rows: what is delivered for padding: "cut" removes the rows, "zero" delivers zeros, "live" delivers
            the hidden states that the model computes there.
        pad_token: the token of "live" padding rows, whatever padding token the checkpoint names.
        pad_position: the position of every padding row; None if positions continue. Only with "live" padding rows.
        layers: the outputs of these decoder layers, counted from 0, before the final norm. Negative indices count from
            the end. Exactly one of `layers` and `hidden_states` is given.
        hidden_states: the same in Hugging Face's numbering: 0 is the embedding output, -1 is after the final norm.
        combine: how n hidden states of shape (L, D) become one tensor: "concat" puts layer after layer into (L, n*D),
            "interleave" puts the n values of each feature side by side in (L, D*n), "stack" makes (n, L, D),
            "stack_rows" makes (L, n, D).
        unit_rms: scale each row of each hidden state to a root mean square of 1, in float32.
        bundle: join this many consecutive hidden states on their features before `combine`.
        dropped_rows: the number of rows dropped in front, usually a system turn.
        negative_prompt: what the system encodes when the user gives no negative prompt; None if it encodes none.
        negative_preset: the preset that encodes negative prompts; None if it is this one.
        hidden_size: the hidden size of the checkpoint that it needs; None if any fits.
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
    closing_token: str | None = None
    max_sequence_length: int = 512
    overlong: Literal["cut", "cut_prompt", "refused"] = "cut"
    padding: Literal["longest", "max_length", "own"] = "longest"
    pad_to_multiple_of: int = 1
    min_length: int = 0
    padding_rows: PaddingRows = "cut"
    pad_token: str = "<|endoftext|>"
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

    def needed_tokens(self) -> dict[str, str]:
        """The tokens that the tokenizer must have, by the field that names them."""
        pad = {"pad_token": self.pad_token} if self.padding_rows == "live" else {}
        return pad | ({"closing_token": self.closing_token} if self.closing_token else {})

    def taps(self, num_hidden_layers: int) -> tuple[Tap, ...]:
        """The places in a model of `num_hidden_layers` layers where this preset takes hidden states.

        Errors: InvalidField when an index does not exist there, or not exactly one of the two numberings is given.
        """
        return _taps(self.layers, self.hidden_states, num_hidden_layers)

    def depth(self, num_hidden_layers: int) -> int:
        """The number of decoder layers that must run. Errors: those of `taps`."""
        return max(tap.depth for tap in self.taps(num_hidden_layers))


@lru_cache(maxsize=256)  # each request asks several times
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


def check_preset(
    preset: Preset,
    num_hidden_layers: int,
    hidden_size: int,
    num_layers: int | None = None,
    has_token: Callable[[str], bool] | None = None,
) -> None:
    """Return if the preset fits a checkpoint of these dims and tokens.

    Args:
        num_hidden_layers, hidden_size: the checkpoint's dims.
        num_layers: the number of decoder layers that are loaded; None if all are.
        has_token: whether the checkpoint's tokenizer has a token; None leaves the tokens unchecked.

    Errors: InvalidField naming the layer, the dim or the token that does not fit.
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
    for field, token in preset.needed_tokens().items():
        if has_token is not None and not has_token(token):
            raise InvalidField(
                field,
                f"{preset.name} needs the token {token!r}, which the checkpoint's tokenizer does not have. "
                f"Give the tokenizer that belongs to the preset with --tokenizer.",
            )
