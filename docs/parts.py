"""The parts of the documents that follow from the code and from the stored measurements, as Markdown."""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import ANSWERS, UNEXPECTED
from app.exposition import NAMESPACE
from app.main import create_app
from app.request.schemas import EncodeLayersRequest, EncodeRequest, TokenizeRequest
from app.service import service_of
from app.settings import Settings, settings_table
from benchmarks.report import RESULTS, Row, number, render_all
from encoder import PRESETS, Preset

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".c", ".h", ".cuh")  # of the files in the tree of docs/architecture.md


class Figure(NamedTuple):
    """A row of the README's table, taken from a row of a stored run.

    Attributes:
        file: in benchmarks/results.
        row: its `what`.
        what: how the README says it.
        peer: the name of the other side's median, and how the README calls that side; None if there is no other side.
    """

    file: str
    row: str
    what: str
    peer: tuple[str, str] | None = None


FIGURES = (
    Figure(
        "cpu.json",
        "forward, 1 × 28 tokens, float32: transformers on PyTorch over ours",
        "forward pass of a prompt of 28 tokens, Qwen3-0.6B",
        ("torch", "transformers on PyTorch"),
    ),
    Figure(
        "cpu.json",
        "POST /encode z-image, 4 prompts: ZImagePipeline.encode_prompt of diffusers over ours",
        "a prompt for Z-Image over HTTP, Qwen3-0.6B",
        ("diffusers", "diffusers, which computes 512 rows"),
    ),
    Figure(
        "cpu.json",
        "POST /encode flux2-klein, 4 prompts: Flux2KleinPipeline.encode_prompt of diffusers over ours",
        "a prompt for FLUX.2 klein over HTTP, Qwen3-0.6B",
        ("diffusers", "diffusers"),
    ),
    Figure(
        "gpu.json",
        "forward on a GPU, klein, 1×512 rows, 40 of them tokens",
        "forward pass of a prompt for FLUX.2 klein, Qwen3-4B",
        ("torch", "transformers on PyTorch"),
    ),
    Figure(
        "cpu.json",
        "POST /encode z-image, 0.3 MB by TCP on loopback: what the service adds to the forward pass",
        "what HTTP, queue and tokenization add to a forward pass",
    ),
    Figure(
        "cpu.json",
        "POST /encode z-image, 0.3 MB by TCP on loopback: a prompt seen before",
        "a prompt that was encoded before",
    ),
)


def figures() -> str:
    """The README's table of six figures."""
    lines = ["| what | here | elsewhere | machine | measured by |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *map(_figure, FIGURES)]) + "\n"


def _figure(figure: Figure) -> str:
    document = json.loads((RESULTS / figure.file).read_text(encoding="utf-8"))
    rows = [Row(**row) for row in document["rows"] if row["what"] == figure.row]
    if len(rows) != 1:
        raise SystemExit(
            f"benchmarks/results/{figure.file} has {len(rows)} rows {figure.row!r}, expected 1. "
            "Put another row into FIGURES in docs/parts.py."
        )
    [row] = rows
    run = document["run"]
    machine = run["device"] or f"CPU, {run['cpus']} cores"
    here, elsewhere = f"{number(row.result)} {row.unit}", ""
    if figure.peer is not None:
        key, peer = figure.peer
        here = f"{number(row.medians['ours'])} {row.medians_unit}"
        elsewhere = f"{number(row.medians[key])} {row.medians_unit}: {peer}"
    return f"| {figure.what} | **{here}** | {elsewhere} | {machine} | `{row.script}` |"


def presets_table() -> str:
    """What each preset takes from the model and what comes back."""
    lines = ["| preset | for | hidden states | window | padding rows | reply |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{preset.name}` | {preset.description} | {_taken(preset)} | {preset.max_sequence_length} "
        f"| {preset.padding_rows} | `{reply_shape(preset)}` |"
        for preset in PRESETS
    ]
    aliases = [f"`{alias}` is another name of `{preset.name}`." for preset in PRESETS for alias in preset.aliases]
    return "\n".join([*lines, "", *aliases]) + "\n"


def _taken(preset: Preset) -> str:
    name, indices = ("layers", preset.layers) if preset.layers is not None else ("hidden_states", preset.hidden_states)
    return f"`{name}` {', '.join(map(str, indices or ()))}"


def reply_shape(preset: Preset) -> str:
    """The shape of a reply's hidden states, as in `[B, n-34, 3*D]`."""
    taken = len(preset.layers or preset.hidden_states or ())
    rows = _rows(preset)
    if preset.combine == "stack_rows":
        return f"[B, {rows}, {taken}, D]"
    stacked, joined = (taken // preset.bundle, preset.bundle) if preset.combine == "stack" else (1, taken)
    features = "D" if joined == 1 else f"{joined}*D"
    return f"[B, {rows}, {features}]" if stacked == 1 else f"[B, {stacked}, {rows}, {features}]"


def _rows(preset: Preset) -> str:
    if preset.padding == "max_length" and preset.padding_rows != "cut":
        return str(preset.max_sequence_length - preset.dropped_rows)
    rows = "m" if preset.pad_to_multiple_of > 1 else "n"
    return f"{rows}-{preset.dropped_rows}" if preset.dropped_rows else rows


def fields_table() -> str:
    """The fields of a request, and which routes take them."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    seen: set[str] = set()
    for model, routes in (
        (TokenizeRequest, "`/tokenize`, `/encode`, `/encode_layers`"),
        (EncodeRequest, "`/encode`, `/encode_layers`"),
        (EncodeLayersRequest, "`/encode_layers` alone"),
    ):
        properties = model.model_json_schema()["properties"]
        lines.append(f"| **{routes}** | | | |")
        lines += [_field(name, properties[name]) for name in properties if name not in seen]
        seen |= set(properties)
    return "\n".join(lines) + "\n"


def _field(name: str, schema: Mapping[str, Any]) -> str:
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    default = "" if schema.get("default") is None else f"`{schema['default']}`"
    return f"| `{name}` | {' or '.join(map(_type, options))} | {default} | {schema['description']} |"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    return f"list of {_type(schema['items'])}s" if schema["type"] == "array" else str(schema["type"])


def errors_table() -> str:
    """Status, code and meaning of each error."""
    lines = ["| status | code | meaning |", "|---|---|---|"]
    for error, (status, code) in ANSWERS.items():
        lines.append(f"| {status} | `{code}` | {(error.__doc__ or '').splitlines()[0]} |")
    lines.append(f"| {UNEXPECTED.status} | `{UNEXPECTED.code}` | A bug: the log has the traceback. |")
    return "\n".join(lines) + "\n"


def metrics_table() -> str:
    """Every metric of ours, with its labels."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    families = service_of(create_app(Settings())).metrics.registry.collect()
    for family in sorted(families, key=lambda family: family.name):
        if not family.name.startswith(NAMESPACE):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in family._labelnames)
        lines.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines) + "\n"


def tree() -> str:
    """Every file of the two packages with the first sentence of its docstring, or of its first comment."""
    lines = [line for package in ("encoder", "app") for line in _folder(ROOT / package, 0)]
    return "\n".join(["```", *lines, "```"]) + "\n"


def _folder(folder: Path, depth: int) -> Iterator[str]:
    yield _line(f"{folder.name}/", _sentence(folder / "__init__.py"), depth)
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.name != "__init__.py")
    for file in files:
        yield _line(file.name, _sentence(file), depth + 1)
    for subfolder in sorted(path for path in folder.iterdir() if any(_sources(path))):
        yield from _folder(subfolder, depth + 1)


def _sources(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix in SUFFIXES)


def _line(name: str, sentence: str, depth: int) -> str:
    return f"{'  ' * depth + name:28} {sentence}".rstrip()


def _sentence(file: Path) -> str:
    """The first sentence of a file, without its full stop."""
    if not file.exists():
        return ""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comment = re.match(r"/\*(.*?)\*/|(//.*?\n)+", text, re.DOTALL)
        text = re.sub(r"^\s*(//|\*)?\s*", "", comment[0].strip("/*"), flags=re.MULTILINE) if comment else ""
    return re.split(r"\.(?:\s|$)|\n\n", text, maxsplit=1)[0].replace("\n", " ").strip()


def import_rules() -> str:
    """The contracts that import-linter enforces, by name."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    return "".join(f"- {contract['name']}\n" for contract in contracts)


def decisions() -> str:
    """A link to each decision."""
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    titles = {page: page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for page in pages}
    return "".join(f"- [{title}](decisions/{page.name})\n" for page, title in titles.items())


PARTS: dict[str, Callable[[], str]] = {
    "figures": figures,
    "presets": presets_table,
    "fields": fields_table,
    "errors": errors_table,
    "metrics": metrics_table,
    "settings": settings_table,
    "benchmarks": render_all,
    "tree": tree,
    "import-rules": import_rules,
    "decisions": decisions,
}
