"""The presets of one service, by name and alias: the built-in ones, and those of the user's preset file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from encoder.errors import InvalidField
from encoder.presets.preset import Preset


@dataclass(frozen=True, slots=True)
class Catalog:
    """Presets by name. Each name or alias belongs to one preset.

    Attributes:
        presets: in the order in which they are listed.
        default: the name of the preset for requests that name none.
    """

    presets: tuple[Preset, ...]
    default: str

    def __iter__(self) -> Iterator[Preset]:
        return iter(self.presets)

    def __contains__(self, name: object) -> bool:
        return any(name in (preset.name, *preset.aliases) for preset in self.presets)

    def get(self, name: str | None) -> Preset:
        """The preset of that name or alias, or the default if the name is None.

        Errors: InvalidField naming all presets when there is none.
        """
        wanted = self.default if name is None else name
        for preset in self.presets:
            if wanted in (preset.name, *preset.aliases):
                return preset
        known = ", ".join(preset.name for preset in self.presets)
        raise InvalidField("preset", f"{wanted!r} does not exist; allowed are {known}.")

    def with_presets(self, more: Iterable[Preset]) -> "Catalog":
        """A catalog of these presets followed by `more`."""
        return replace(self, presets=(*self.presets, *more))

    def only(self, names: Sequence[str]) -> "Catalog":
        """A catalog of the presets with these names or aliases, and of the presets that encode their negative prompts.

        Args:
            names: at least one.
        Returns:
            The presets in their order here. The default stays if it is among them; else it is the first of `names`.

        Errors: InvalidField naming all presets when one does not exist.
        """
        wanted = [self.get(name) for name in names]
        wanted += [self.get(preset.negative_preset) for preset in wanted if preset.negative_preset is not None]
        default = self.default if self.get(None) in wanted else wanted[0].name
        return Catalog(tuple(preset for preset in self.presets if preset in wanted), default)

    def with_default(self, name: str) -> "Catalog":
        """A catalog of the same presets with another default."""
        return replace(self, default=name)
