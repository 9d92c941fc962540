"""The documents say what the code says, where a machine can tell."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from docs.generate import generate, pages
from docs.parts import FIGURES, PARTS, ROOT, reply_shape
from encoder import PRESETS, Preset

PRESETS_MD = ROOT / "docs" / "presets.md"
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "examples").glob("*.md"),
    *(ROOT / "examples").glob("*/*.md"),
]


@pytest.mark.parametrize("page", [*pages()], ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    """`make docs` brings them up to date."""
    text = page.read_text(encoding="utf-8")

    assert text == generate(text), "run make docs"


def test_every_part_is_in_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages())

    assert [name for name in PARTS if f"<!-- generated: {name} -->" not in text] == []


def test_the_readme_has_six_figures_and_150_lines_at_most() -> None:
    assert len(FIGURES) == 6
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")

    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index] == ["README.md"]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, anchor


def test_every_preset_has_a_row_that_says_where_its_reply_goes() -> None:
    """In the order in which GET /presets lists them."""
    text = PRESETS_MD.read_text(encoding="utf-8").partition("## Where it goes")[2]

    assert re.findall(r"^\| `([^`]+)` \| ", text, flags=re.MULTILINE) == [preset.name for preset in PRESETS]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_reply_has_the_shape_that_its_row_says(client: httpx.Client, preset: Preset) -> None:
    body = {"prompts": ["a cat", "a red fox"], "preset": preset.name}
    response = client.post("/encode", json=body, headers={"accept": "application/json"})
    if response.status_code == 422:
        pytest.skip(response.json()["error"]["message"])
    reply: dict[str, Any] = response.raise_for_status().json()
    tokens = max(reply["num_tokens"])
    rounded = -(-tokens // preset.pad_to_multiple_of) * preset.pad_to_multiple_of

    shape = eval(reply_shape(preset), {"B": 2, "D": 32, "n": tokens, "m": rounded})

    assert reply["hidden_states"]["shape"] == shape


def test_every_route_has_a_row(client: httpx.Client) -> None:
    """In docs/api.md or, with others' protocols, in docs/drop-ins.md."""
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("api.md", "drop-ins.md"))
    cells = "".join(re.findall(r"^\| (`(?:GET|POST) .*?) \|", text, flags=re.MULTILINE))

    assert [path for path in client.get("/openapi.json").json()["paths"] if f"{path}`" not in cells] == []


def test_every_issue_form_asks_for_the_output_of_doctor() -> None:
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]

    assert len(forms) == 3
    assert [form.name for form in forms if "qwen3-encoder doctor" not in form.read_text(encoding="utf-8")] == []


def test_the_tree_names_every_file_of_both_packages() -> None:
    """docs/architecture.md is where a newcomer looks first."""
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The tree")[2]
    named = re.findall(r"^ *([\w.]+\.(?:py|c|h|cuh))(?: |$)", tree, flags=re.MULTILINE)
    files = [path for package in ("app", "encoder") for path in (ROOT / package).rglob("*") if path.is_file()]

    kept = [path.name for path in files if path.suffix in {".py", ".c", ".h", ".cuh"} and path.name != "__init__.py"]
    assert sorted(named) == sorted(kept)
