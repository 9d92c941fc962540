"""The index of frontends leads to every example."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "frontends.md"
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
PAGES = [INDEX, *(ROOT / "examples").glob("*/README.md"), ROOT / "examples" / "curl.md"]


def test_every_example_is_in_the_index() -> None:
    """Whoever looks for a frontend starts there."""
    linked = {(INDEX.parent / path).resolve() for path, _ in LINK.findall(INDEX.read_text(encoding="utf-8"))}
    examples = {page for page in PAGES if page != INDEX}

    assert examples <= linked


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
            if path.startswith("https://"):
                continue
            target = page.parent / path
            assert target.is_file(), f"{page.name}: {path}"
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor[1:] in {"", *(heading.lower().replace(" ", "-") for heading in headings)}


def test_every_script_for_diffusers_is_in_its_table() -> None:
    folder = ROOT / "examples" / "diffusers"
    scripts = {file.name for file in folder.glob("*.py")} - {"common.py"}

    assert set(re.findall(r"^\| `(\w+\.py)` \|", (folder / "README.md").read_text(), flags=re.MULTILINE)) == scripts
