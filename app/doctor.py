"""Checks the installation and prints a report that can be pasted into an issue: `qwen3-encoder doctor`.

Imports nothing but the standard library until a check needs it, so that `python -m app.doctor` also says what is wrong
where MLX or a dependency cannot be imported.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from app.versions import version_of

PACKAGES = ("qwen3-encoder", "mlx", "numpy", "tokenizers", "safetensors", "fastapi", "uvicorn")
BACKENDS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal")
CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that matrix products gain from, as the Linux kernel names them; `asimd` is NEON.
INSTRUCTION_SETS = {
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
}
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")

ISSUE = "Open an issue with this report."
REINSTALL = "Install again into an empty environment: make clean install, or pip install 'qwen3-encoder[cpu]'."
COMPILE = "Install a wheel, or a C compiler (apt-get install gcc) and then the package again."

Section = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    problem: str
    next_step: str


@dataclass(slots=True)
class Report:
    """What the checks found.

    Attributes:
        sections: facts by name, in sections by title.
        findings: problems; empty when all is well.
    """

    sections: dict[str, Section] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def find(self, problem: str, next_step: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(problem, next_step))

    def text(self) -> str:
        """For people, and for an issue. The home directory, which names the user, is written ~."""
        lines = ["qwen3-encoder doctor"]
        for title, section in self.sections.items():
            lines += ["", title, *(f"  {name:20} {value}" for name, value in section.items())]
        lines += ["", "findings" if self.findings else "All is well."]
        for finding in self.findings:
            lines += [f"  - {finding.problem}", f"    next: {finding.next_step}"]
        return _without_home("\n".join(lines))

    def json(self) -> str:
        """For programs."""
        document = self.sections | {"findings": [asdict(finding) for finding in self.findings]}
        return _without_home(json.dumps(document, indent=1))


def doctor(as_json: bool = False) -> int:
    """Run all checks and print the report; 0 when all is well, else 1."""
    report = examine()
    print(report.json() if as_json else report.text())
    return 1 if report.findings else 0


def examine() -> Report:
    """The report of all checks. A check that raises becomes a finding."""
    report = Report()
    for title, (check, next_step) in CHECKS.items():
        try:
            report.sections[title] = check(report)
        except Exception as error:  # noqa: BLE001  # the report is for whatever is broken
            report.find(f"{title}: {type(error).__name__}: {error}", next_step)
    return report


def check_versions(report: Report) -> Section:
    """Versions of the packages, and that exactly one backend of MLX is installed."""
    installed = {name: version_of(name) for name in PACKAGES}
    backends = {name: version for name in BACKENDS if (version := version_of(name))}
    for name, version in installed.items():
        if version is None:
            report.find(f"{name} is not installed.", REINSTALL)
    if len(backends) != 1:
        found = f"{len(backends)} backends of MLX are installed ({', '.join(backends) or 'none'}), expected 1."
        report.find(found, f"They overwrite each other's files. {REINSTALL}")
    versions = {name: version or "not installed" for name, version in (installed | backends).items()}
    return {"python": f"{platform.python_version()} ({platform.python_implementation()})"} | versions


def check_machine(report: Report) -> Section:  # noqa: ARG001  # the signature of a check
    """The operating system, the CPU, and the GPU if the driver shows one."""
    name, flags = _cpu()
    system = f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver()) or 'C library unknown'}"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": system,
        "cpu": f"{name}, {platform.machine()}, {cpus} usable of {os.cpu_count()}",
        "instruction sets": " ".join(sorted(INSTRUCTION_SETS & flags)) or "unknown",
        "nvidia": _output(*NVIDIA_SMI) or "none",
    }


def check_mlx(report: Report) -> Section:
    """The device and the BLAS that MLX computes with, and the memory that a model may take."""
    from encoder import activate, available_bytes

    blas = activate()  # before mlx.core is imported
    import mlx.core as mx

    device = str(mx.default_device())
    if "cpu" in device and _output(*NVIDIA_SMI):
        report.find("There is an NVIDIA GPU, and MLX computes on the CPU.", "make clean install BACKEND=cuda13")
    if blas.remedy:
        report.find(f"MLX multiplies matrices with {blas.name}, which is slow.", blas.remedy)
    memory = available_bytes()
    facts = {"device": device, "memory available": "unknown" if memory is None else f"{memory / 1e9:.1f} GB"}
    return facts | {f"blas {name}": str(value) for name, value in asdict(blas).items() if value is not None}


def check_settings(report: Report) -> Section:
    """The settings that differ from their defaults. The API key is never shown."""
    from app.access.keys import Keys
    from app.settings import Settings, SettingsError, load_settings, misspelt_variables, variable

    for problem in misspelt_variables():
        report.find(problem, "Correct its name, or unset it.")
    try:
        settings = load_settings({})
    except SettingsError as error:
        report.find(str(error), "Correct the environment variable; docs/settings.md lists all of them.")
        return {}
    for name in ("cache_dir", "disk_cache_dir"):
        folder: Path | None = getattr(settings, name)
        if folder is not None and not _is_writable(folder):
            report.find(
                f"{variable(name)}: {folder} cannot be written to.", "Name another folder, or change its owner."
            )
    try:
        Keys.of(settings)
    except SettingsError as error:
        report.find(str(error), "Correct the file, or name another.")
    values = {name: getattr(settings, name) for name in Settings.model_fields}
    changed = {name: value for name, value in values.items() if value != Settings.model_fields[name].default}
    shown = {variable(name): "set" if name == "api_key" else str(value) for name, value in changed.items()}
    return shown or {"all": "as by default"}


def check_demo(report: Report) -> Section:
    """Whether the demo checkpoint loads and gives finite numbers."""
    import numpy as np

    from encoder import LAST_HIDDEN_STATE, ModelOptions, TextEncoder

    started = time.perf_counter()
    with _warnings_of("encoder.checkpoint"), _warnings_of("encoder.qwen3") as warnings:  # the first: random weights
        encoder = TextEncoder.open(ModelOptions("demo"))
    loaded = time.perf_counter()
    [embeds] = encoder.encode(["a cat"], LAST_HIDDEN_STATE, "float32")
    encoded = time.perf_counter()
    if not np.isfinite(embeds.hidden_states).all():
        report.find("The demo checkpoint gives NaN or infinity.", ISSUE)
    if encoder.info.device == "cpu" and encoder.info.forward == "plain" and sys.platform == "linux":
        report.find("No compiled kernels are in use: short prompts take two to four times as long.", COMPILE)
    root_mean_square = float(np.sqrt((embeds.hidden_states**2).mean()))
    return {
        "loaded in": f"{loaded - started:.2f} s",
        "encoded in": f"{encoded - loaded:.2f} s",
        "hidden states": f"{embeds.hidden_states.shape}, root mean square {root_mean_square:.4f}",
        "compute dtype": encoder.info.compute_dtype,
        "forward pass": encoder.info.forward,
        "warnings": " | ".join(warnings) or "none",
    }


# Each check, and what to do if it raises.
CHECKS: dict[str, tuple[Callable[[Report], Section], str]] = {
    "versions": (check_versions, ISSUE),
    "machine": (check_machine, ISSUE),
    "mlx": (check_mlx, REINSTALL),
    "settings": (check_settings, REINSTALL),
    "demo checkpoint": (check_demo, f"If a finding above does not explain it: {ISSUE}"),
}


@contextlib.contextmanager
def _warnings_of(package: str) -> Iterator[list[str]]:
    """What the package's modules log in the block, from warnings up. It goes into the list only."""
    logger, handler, messages = logging.getLogger(package), logging.Handler(logging.WARNING), list[str]()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")


def _cpu() -> tuple[str, frozenset[str]]:
    """The name of the CPU and its features."""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
        return name, frozenset({"asimd"} if platform.machine() == "arm64" else ())
    try:
        fields = [line.partition(":") for line in CPUINFO.read_text().splitlines()]
    except OSError:
        return platform.processor() or "unknown", frozenset()
    values = {name.strip(): value.strip() for name, _, value in reversed(fields)}
    flags = values.get("flags") or values.get("Features") or ""  # on x86-64, on aarch64
    return values.get("model name", "unknown"), frozenset(flags.split())


def _is_writable(folder: Path) -> bool:
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK)


def _output(*command: str) -> str:
    """What a command prints, or nothing if it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(finished.stdout.strip().splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command by itself."""
    parser = argparse.ArgumentParser(prog="python -m app.doctor", description="check the installation")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return doctor(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
