"""What the README and docs/api.md show is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
PYTHON = re.findall(r"```python\n(.*?)```", PAGES, flags=re.DOTALL)
SHELL = re.findall(r"```\n\$ (curl .*?)\n(\{.*?)\n```", PAGES, flags=re.DOTALL)  # commands, and what the last prints


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_the_python_examples_print_what_is_said(server: RunningServer, code: str) -> None:
    """The last line of each is a comment with the output."""
    expected = code.strip().splitlines()[-1].removeprefix("# ")
    code = code.replace(ADDRESS, server.url)

    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert output.strip() == expected


@pytest.mark.parametrize(("commands", "expected"), SHELL, ids=range(len(SHELL)))
def test_the_shell_examples_print_what_is_said(
    server: RunningServer, commands: str, expected: str, tmp_path: Path
) -> None:
    script = commands.replace(ADDRESS, server.url).replace("\n$ python ", f"\n{sys.executable} ")

    output = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    # Layers that ran are 0 where another test has asked before; numbers may round otherwise on another machine.
    ours, theirs = (re.sub(r'"layers_run":\d+', "", text.strip()) for text in (output, expected))
    assert ours[:150] == theirs[:150]


def test_there_are_examples() -> None:
    """One of each in the README."""
    assert len(PYTHON) == 2
    assert len(SHELL) == 3
    assert README.count("```python\n") == README.count("$ curl ") == 1
