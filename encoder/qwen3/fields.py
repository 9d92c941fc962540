"""Values of a JSON object that somebody else wrote, each checked as it is taken."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from encoder.errors import CheckpointError
from encoder.messages import shown

MAX_DIM = 2**24  # far above any model, and array sizes still fit into 64 bits
MAX_NUMBER = 1e30  # far above any model, and its float32 is finite


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of a config by key. Null means absent, as in transformers.

    Attributes:
        values: as parsed.
        where: the file that they come from, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands, `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error of a value that is not as expected."""
        found = f"{key} is {shown(self.values[key])}" if key in self.values else f"has no {key}"
        return CheckpointError(f"{self.where}: {found}, expected {expected}. Is it a Qwen3 or Qwen3-VL, as published?")

    def flag(self, key: str) -> bool:
        """A boolean, False where it is absent."""
        if self.get(key) not in (None, True, False):
            raise self.wrong(key, "true or false")
        return bool(self.get(key))

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
            raise self.wrong(key, "a positive number")
        return float(value)

    def positive(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_DIM:
            raise self.wrong(key, f"an integer from 1 to {MAX_DIM}")
        return value

    def inner(self, key: str) -> "Fields":
        """The fields of a nested object, none where it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, self.where)
