"""Figures: what they hold, how a run stores them, and how docs/benchmarks.md shows a stored run."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("mlx", "numpy", "scipy-openblas32", "torch", "transformers", "diffusers", "mflux", "uvicorn")
HEADER = ("| what | result | goal | medians | script |", "|---|---|---|---|---|")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure and the measurements behind it.

    Attributes:
        what: the figure, in words.
        script: the module that measured it.
        result: in `unit`; "×" is the peer's time divided by ours, in one run.
        goal: a bound for the result; None if there is none.
        at_least: True if the goal is a lower bound, False if it is an upper bound.
        medians: in `medians_unit`, by the name of what was measured.
    """

    what: str
    script: str
    result: float
    unit: str = "×"
    goal: float | None = None
    at_least: bool = True
    medians: Mapping[str, float] = field(default_factory=dict)
    medians_unit: str = "s"

    @property
    def reached(self) -> bool:
        """Whether the result meets its goal."""
        return self.goal is None or (self.result >= self.goal if self.at_least else self.result <= self.goal)

    def markdown(self) -> str:
        """The figure as a row of the table."""
        goal = "" if self.goal is None else f"{'≥' if self.at_least else '≤'} {number(self.goal)}"
        medians = ", ".join(f"{name} {number(value)}" for name, value in self.medians.items())
        cells = (
            self.what,
            f"{number(self.result)} {self.unit}",
            goal if self.reached else f"{goal}: missed",
            f"{medians} {self.medians_unit}".strip() if medians else "",
            f"`{self.script}`",
        )
        return f"| {' | '.join(cells)} |"


def compare(what: str, script: str, seconds: Mapping[str, float], goal: float | None = None) -> Row:
    """A row that says how many times as fast the first of `seconds` is as the second; any others are listed only."""
    ours, peer, *_ = seconds.values()
    return Row(what, script, peer / ours, goal=goal, medians=seconds)


@contextmanager
def report(output: Path | None, device: str | None = None) -> Iterator[list[Row]]:
    """Collect rows, and at the end print their table and write it to `output` as JSON and beside it as Markdown.

    Args:
        device: an accelerator's name, where the rows are about one.
    """
    rows: list[Row] = []
    load_before = os.getloadavg()[0]
    yield rows
    run = _conditions(device) | {"load_before": load_before, "load_after": os.getloadavg()[0]}
    document = {"run": run, "rows": [asdict(row) for row in rows]}
    print(render(document))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(render(document), encoding="utf-8")


def render(document: Mapping[str, Any]) -> str:
    """A stored run as Markdown: its conditions and its table."""
    run = document["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    changed = ", with local changes" if run["dirty"] else ""
    lines = [
        f"{run['device'] or run['cpu']}, {run['cpus']} CPUs, {run['date']}, commit {run['commit']}{changed}. "
        f"Load average {run['load_before']:.1f} before and {run['load_after']:.1f} after. "
        f"{versions}. BLAS under MLX: {run['blas']}. `{run['command']}`",
        "",
        *HEADER,
        *(Row(**row).markdown() for row in document["rows"]),
    ]
    return "\n".join(lines) + "\n"


def render_all(folder: Path = RESULTS) -> str:
    """The tables of all stored runs."""
    files = sorted(folder.glob("*.json"))
    return "\n".join(render(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _conditions(device: str | None) -> dict[str, Any]:
    """Machine, versions, commit and command of this run."""
    installed = {distribution.name for distribution in metadata.distributions()}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device,
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES if name in installed},
        },
        "blas": _output(sys.executable, "-c", "from encoder import activate as a; print(a().name, a().version or '')"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def _cpu() -> str:
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """The output of a command; empty if it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
