"""Versions of installed packages."""

from importlib import metadata


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed, as this project when it runs from its sources."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
