"""Writes the generated parts of the documents: python -m docs.generate, or make docs.

A generated part is between two comments, `<!-- generated: NAME -->` and `<!-- end -->`, where NAME is one of `PARTS` in
docs/parts.py. Everything else is written by hand. tests/test_docs.py fails if a part is not up to date.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from docs.parts import PARTS, ROOT

PART = re.compile(r"<!-- generated: (?P<name>[\w-]+) -->\n(?P<content>.*?)<!-- end -->", re.DOTALL)


def pages() -> Iterator[Path]:
    """The documents that have a generated part."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if PART.search(page.read_text(encoding="utf-8")):
            yield page


def generate(text: str) -> str:
    """The text of a document with its generated parts as they are now."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- generated: {match['name']} -->\n{PARTS[match['name']]()}<!-- end -->"

    return PART.sub(fill, text)


def main() -> None:
    """Write the generated parts of all documents."""
    for page in pages():
        page.write_text(generate(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
