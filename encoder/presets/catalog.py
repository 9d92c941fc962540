"""The presets of one service, by name and alias: those built in, and those of its own preset file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from encoder.errors import InvalidField
from encoder.presets.preset import Preset


@dataclass(frozen=True, slots=True)
class Catalog:
    """Presets in the order in which they are listed. No name or alias stands for two of them.

    Attributes:
        presets: all of them.
        default: name of the one that a request gets that names none.
    """

    presets: tuple[Preset, ...]
    default: str

    def __iter__(self) -> Iterator[Preset]:
        return iter(self.presets)

    def __contains__(self, name: object) -> bool:
        return any(name in (preset.name, *preset.aliases) for preset in self.presets)

    def get(self, name: str | None) -> Preset:
        """The preset of that name or alias; the default where the name is None.

        Errors: InvalidField naming all presets when there is none.
        """
        wanted = self.default if name is None else name
        for preset in self.presets:
            if wanted in (preset.name, *preset.aliases):
                return preset
        known = ", ".join(preset.name for preset in self.presets)
        raise InvalidField("preset", f"{wanted!r} does not exist; allowed are {known}.")

    def with_presets(self, more: Iterable[Preset]) -> "Catalog":
        """These presets, and `more` after them."""
        return replace(self, presets=(*self.presets, *more))

    def only(self, names: Sequence[str]) -> "Catalog":
        """The presets of these names or aliases, at least one, with those that encode their negatives.

        The default stays where it is among them; else it is the first that was named.
        Errors: InvalidField naming all presets when one does not exist.
        """
        wanted = [self.get(name) for name in names]
        wanted += [self.get(preset.negative_preset) for preset in wanted if preset.negative_preset is not None]
        default = self.default if self.get(None) in wanted else wanted[0].name
        return Catalog(tuple(preset for preset in self.presets if preset in wanted), default)

    def with_default(self, name: str) -> "Catalog":
        """The same presets with another default."""
        return replace(self, default=name)
