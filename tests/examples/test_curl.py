"""The page of curl lines: every one runs, and prints what stands below it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import RunningServer

PAGE = Path(__file__).parents[2] / "examples" / "curl.md"
ADDRESS = "http://127.0.0.1:8000"
BLOCK = re.compile(r"^```sh\n(.*?)^```\n(?:```\n(.*?)^```\n)?", flags=re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
PROGRAMS = ("curl", "jq", "unzip", "python3")


def missing(commands: str) -> list[str]:
    return [program for program in PROGRAMS if program in commands and shutil.which(program) is None]


def pattern(output: str) -> str:
    """The documented output as a regular expression: … is anything."""
    return ".*".join(re.escape(part) for part in output.split("…"))


def test_every_curl_line_of_the_page_is_in_a_block() -> None:
    """But the one for a Unix socket, which names a file of the reader's."""
    text = PAGE.read_text(encoding="utf-8")

    assert sum(commands.count("curl -s") for commands, _ in BLOCKS) == text.count("curl -s")
    assert all(output for _, output in BLOCKS)


@pytest.mark.parametrize(("commands", "output"), BLOCKS, ids=range(len(BLOCKS)))
def test_the_lines_print_what_the_page_says(server: RunningServer, tmp_path: Path, commands: str, output: str) -> None:
    if missing(commands):
        pytest.skip(f"needs {', '.join(missing(commands))}")
    process = subprocess.run(
        ["bash", "-eu", "-c", commands.replace(ADDRESS, server.url)],
        cwd=tmp_path,
        env=os.environ | {"QWEN3_ENCODER_API_KEY": "none-is-asked-for"},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert process.returncode == 0, process.stderr  # of the last command; `head` closes the pipe on those before it
    assert re.fullmatch(pattern(output.strip()), process.stdout.strip(), flags=re.DOTALL), process.stdout
