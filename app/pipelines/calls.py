"""What the arguments of a call, and the pipeline itself, say about text: whether negatives are used, and the window."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

Arguments = dict[str, Any]


def scale_over(threshold: float, name: str = "guidance_scale") -> Callable[[Any, Arguments], bool]:
    """Negatives are used where this argument of the call, or its default, is over the threshold."""

    def guided(pipe: Any, more: Arguments) -> bool:
        parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
        return parameter is not None and more.get(name, parameter.default) > threshold

    return guided


scale_over_0 = scale_over(0)
scale_over_1 = scale_over(1)
true_cfg_scale_over_1 = scale_over(1, "true_cfg_scale")


def scale_over_1_unless_distilled(pipe: Any, more: Arguments) -> bool:
    """Negatives are used over 1, but never by a distilled model."""
    return scale_over_1(pipe, more) and not pipe.config.get("is_distilled", False)


def guider(pipe: Any, more: Arguments) -> bool:
    """Negatives are used where the guider of a modular pipeline asks for them."""
    if hasattr(pipe, "requires_unconditional_embeds"):
        return bool(pipe.requires_unconditional_embeds)
    return getattr(pipe, "guider", None) is not None and pipe.guider.num_conditions > 1


def rows_kept(pipe: Any, preset: Mapping[str, Any], more: Arguments) -> int | None:
    """`max_sequence_length` of the call, which does not count the rows that are dropped; else the preset's window."""
    kept = more.get("max_sequence_length")
    return None if kept is None else kept + preset["dropped_rows"]


def preset_window(pipe: Any, preset: Mapping[str, Any], more: Arguments) -> int | None:
    """The preset's window, whatever the call says."""
    return None


def prompt_max_tokens(pipe: Any, preset: Mapping[str, Any], more: Arguments) -> int | None:
    """The window that the pipeline is configured with."""
    return int(pipe.config.prompt_max_tokens)
