"""Says in words what is wrong with a request: the field, the value found, what is allowed."""

from collections.abc import Sequence
from typing import Any

MAX_PROBLEMS = 5
HINTS = {
    "layers": "layers belongs to POST /encode_layers.",
    "hidden_states": "hidden_states belongs to POST /encode_layers.",
    "combine": "combine belongs to POST /encode_layers.",
    "text": "did you mean prompt?",
    "input": "did you mean prompt or prompts?",
    "inputs": "did you mean prompts?",
    "model": "one service serves one model; see GET /info.",
}


def describe(problems: Sequence[Any]) -> tuple[str, str | None]:
    """One message for pydantic's problems: field, value found, what is allowed; and a hint where there is one."""
    shown = [_describe(problem) for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(shown)
    unknown = (str(problem["loc"][-1]) for problem in problems if problem["type"] == "extra_forbidden")
    hint = next((HINTS[name] for name in unknown if name in HINTS), None)
    return "; ".join(shown) + (f"; and {more} more." if more > 0 else "."), hint


def _describe(problem: Any) -> str:
    field = _path(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field"
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "expected")
    if problem["type"] in ("model_type", "model_attributes_type"):
        message = "expected an object"  # pydantic speaks of dictionaries and classes
    return f"{field}: {message}, found {shorten(problem['input'])}"


def _path(loc: Sequence[int | str]) -> str:
    """`("body", "prompts", 3)` as `prompts[3]`, in printable ASCII, so that it cannot break a log line or a reply."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{ascii(part)[1:-1]:.80}" for part in loc)
    return path.removeprefix(".body.").removeprefix(".") or "body"


def shorten(value: object, length: int = 60) -> str:
    """A value in printable ASCII, cut to a length that fits a message."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, str | bytes):
        value = value[: length + 1]  # the rest would only be escaped and cut off again
    elif isinstance(value, int | float) and abs(value) >= 10**length:
        return f"a number of more than {length} digits"
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
