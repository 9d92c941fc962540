"""Chooses how many decoder layers to load: only as many as the presets that will be served can use."""

from collections.abc import Iterable
from dataclasses import dataclass

from encoder.errors import CheckpointError, InvalidField
from encoder.presets.preset import Preset, check_preset
from encoder.qwen3.config import Qwen3Config


@dataclass(frozen=True, slots=True)
class Depth:
    """How many decoder layers to load.

    Attributes:
        layers: number of layers, counted from the first.
        reason: why this number, as text for a log.
    """

    layers: int
    reason: str


def choose_depth(config: Qwen3Config, num_layers: int | None = None, presets: Iterable[Preset] = ()) -> Depth:
    """The number of decoder layers to load from a checkpoint, and the reason for it.

    Args:
        config: dims of the checkpoint.
        num_layers: number that the user asked for; None derives it from the presets.
        presets: every preset that will be served; empty means that any may be asked for, so all layers are loaded.
    Errors: CheckpointError when no preset fits the dims, or when a preset that fits needs more than num_layers.
    """
    depths: dict[str, int] = {}
    misfits: list[str] = []
    for preset in presets:
        try:
            check_preset(preset, config.num_hidden_layers, config.hidden_size)
            depths[preset.name] = preset.depth(config.num_hidden_layers)
        except InvalidField as error:
            misfits.append(f"{preset.name}: {error}")
    if misfits and not depths:
        raise CheckpointError(f"None of the presets to be served fits this checkpoint. {' '.join(misfits)}")
    deepest = max(depths, key=lambda name: depths[name], default="")
    if num_layers is not None:
        if depths.get(deepest, 0) > num_layers:
            raise CheckpointError(
                f"num_layers is {num_layers}, and {deepest} needs {depths[deepest]} decoder layers. Leave num_layers "
                f"out to load as many as the presets need."
            )
        return Depth(min(num_layers, config.num_hidden_layers), "set by num_layers")
    if not depths:
        return Depth(config.num_hidden_layers, "any preset may be asked for")
    return Depth(depths[deepest], f"{deepest} needs the most of the presets served")
