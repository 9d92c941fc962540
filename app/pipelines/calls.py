"""What a call of a pipeline says about text: whether negatives are used, and how long the window is."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

Arguments = dict[str, Any]


def scale_over(threshold: float, name: str = "guidance_scale") -> Callable[[Any, Arguments], bool]:
    """Where this argument of the call, or its default, is over the threshold."""

    def guided(pipe: Any, more: Arguments) -> bool:
        parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
        return parameter is not None and more.get(name, parameter.default) > threshold

    return guided


def scale_over_one_unless_distilled(pipe: Any, more: Arguments) -> bool:
    """As the FLUX.2 klein pipelines do."""
    return scale_over(1)(pipe, more) and not pipe.config.get("is_distilled", False)


def guider(pipe: Any, more: Arguments) -> bool:
    """Where the guider of a modular pipeline asks for them."""
    if hasattr(pipe, "requires_unconditional_embeds"):
        return bool(pipe.requires_unconditional_embeds)
    return getattr(pipe, "guider", None) is not None and pipe.guider.num_conditions > 1


def preset_window(pipe: Any, preset: Mapping[str, Any], more: Arguments) -> int | None:
    """`max_sequence_length` of the call, which does not count rows that are dropped."""
    return more["max_sequence_length"] + preset["dropped_rows"] if "max_sequence_length" in more else None


def own_window(pipe: Any, preset: Mapping[str, Any], more: Arguments) -> int | None:
    """The preset's, whatever the call says: the pipeline itself shortens embeds that are too long for it."""
    return None


def prompt_max_tokens(pipe: Any, preset: Mapping[str, Any], more: Arguments) -> int | None:
    """As the pipeline is configured."""
    return int(pipe.config.prompt_max_tokens)
