"""Figures of the long runs: a table at the end, with the reach beside each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

FIGURES = pytest.StashKey[list[str]]()


class Figures:
    """Collects figures for the table at the end of a run."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def add(self, what: str, found: object, reach: str = "") -> None:
        """One row."""
        self._lines.append(f"{what:<48} {found!s:<60} {reach}".rstrip())


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """The table of this run."""
    return Figures(pytestconfig.stash.setdefault(FIGURES, []))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """Where a service logs; shown if the test fails."""
    path = tmp_path / "log"
    yield path
    if path.exists():
        print(path.read_text(errors="replace")[-5000:])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(FIGURES, [])
    if lines:
        terminalreporter.write_sep("=", "robustness")
        for line in lines:
            terminalreporter.write_line(line)
