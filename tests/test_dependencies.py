"""An installation without the packages for development has all that is imported."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("cpu", "otel")  # of users; one backend of MLX stands for all
OPTIONAL = {"torch", "ftfy"}  # imported where a user's own pipeline has them


def imported() -> Iterator[tuple[str, str]]:
    """Each package that the service imports, and a file that does."""
    for file in (*ROOT.glob("app/**/*.py"), *ROOT.glob("encoder/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from ((name.partition(".")[0], str(file.relative_to(ROOT))) for name in names)


def declared() -> set[str]:
    """The distributions that pip installs with the service."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return {_normal(re.split(r"[^\w.-]", line)[0]) for line in (*project["dependencies"], *extras)}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_that_is_imported_is_declared() -> None:
    """Packages that only tests need are installed beside the service, here and in CI."""
    distributions, installed = packages_distributions(), declared()
    missing = {
        f"{package} in {file}"
        for package, file in imported()
        if package not in sys.stdlib_module_names and package not in {"app", "encoder", *OPTIONAL}
        if not {_normal(name) for name in distributions.get(package, [package])} & installed
    }

    assert missing == set()
