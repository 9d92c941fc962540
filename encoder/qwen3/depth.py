"""How many decoder layers are loaded, and why: none that nobody can ask for."""

from collections.abc import Iterable
from dataclasses import dataclass

from encoder.errors import CheckpointError, InvalidField
from encoder.presets.preset import Preset, check_preset
from encoder.qwen3.config import Qwen3Config


@dataclass(frozen=True, slots=True)
class Depth:
    """Decoder layers to load.

    Attributes:
        layers: the first so many.
        reason: for people: why no more, or that these are all.
    """

    layers: int
    reason: str


def choose_depth(config: Qwen3Config, num_layers: int | None = None, presets: Iterable[Preset] = ()) -> Depth:
    """The layers to load of a checkpoint with these dims.

    Args:
        config: the dims.
        num_layers: as asked for; None leaves it to the presets.
        presets: all that will be served; none means any, whose layers are not known.
    Errors: CheckpointError when none of the presets fits the dims, or one that does needs more than num_layers.
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
        raise CheckpointError(f"No preset to be served fits this checkpoint. {' '.join(misfits)}")
    deepest = max(depths, key=lambda name: depths[name], default="")
    if num_layers is not None:
        if depths.get(deepest, 0) > num_layers:
            raise CheckpointError(
                f"num_layers is {num_layers}, and {deepest} needs {depths[deepest]} decoder layers. Leave it out: "
                f"what the presets need is loaded."
            )
        return Depth(min(num_layers, config.num_hidden_layers), "as num_layers says")
    if not depths:
        return Depth(config.num_hidden_layers, "all")
    return Depth(depths[deepest], f"{deepest} needs so many, and no other preset more")
