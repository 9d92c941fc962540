"""The report on an installation: what is there, what is wrong, and what to do about it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import encoder
from app import doctor
from app.cli import main
from encoder.qwen3.forward import cpu_kernels

ROOT = Path(__file__).parents[2]


def findings(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """Those of a run, and that the exit code says whether there are any."""
    code = main(["doctor", "--json"])
    found: list[dict[str, str]] = json.loads(capsys.readouterr().out)["findings"]
    assert code == bool(found)
    return found


def test_a_working_installation_is_reported_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])

    printed = capsys.readouterr().out
    if encoder.activate().remedy or "No compiled kernels" in printed:
        pytest.skip("this machine has no BLAS or no compiler, which is a finding")
    assert code == 0, printed
    assert "All is well." in printed
    for word in ("mlx", "numpy", "instruction sets", "device", "blas name", "memory available", "encoded in"):
        assert word in printed


def test_settings_that_differ_from_the_defaults_are_shown_without_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWEN3_ENCODER_API_KEY", "hush")
    monkeypatch.setenv("QWEN3_ENCODER_MAX_PROMPTS", "7")

    for arguments in (["doctor"], ["doctor", "--json"]):
        main(arguments)

        printed = capsys.readouterr().out
        assert "QWEN3_ENCODER_MAX_PROMPTS" in printed
        assert "QWEN3_ENCODER_API_KEY" in printed
        assert "QWEN3_ENCODER_PORT" not in printed
        assert "hush" not in printed


def test_a_bad_setting_is_a_finding_and_the_rest_is_still_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWEN3_ENCODER_PORT", "eighty")

    code = main(["doctor"])

    printed = capsys.readouterr().out
    assert code == 1
    assert "QWEN3_ENCODER_PORT" in printed
    assert "next: Correct the environment variable" in printed
    assert "encoded in" in printed


def test_a_folder_that_cannot_be_written_to_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN3_ENCODER_DISK_CACHE_DIR", str(tmp_path / "file" / "cache"))

    assert "QWEN3_ENCODER_DISK_CACHE_DIR" in findings(capsys)[-1]["problem"]


def test_a_slow_blas_is_a_finding_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = replace(encoder.activate(), name="reference BLAS", remedy="Install another.")
    monkeypatch.setattr(encoder, "activate", lambda: slow)

    [finding] = findings(capsys)

    assert "reference BLAS" in finding["problem"]
    assert finding["next_step"] == "Install another."


@pytest.mark.parametrize("backends", [(), ("mlx-cpu", "mlx-cuda-12")], ids=["none", "two"])
def test_another_number_of_backends_than_one_is_a_finding(
    backends: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two overwrite each other's libmlx.so."""
    monkeypatch.setattr(doctor, "version_of", lambda name: "1" if name in (*doctor.PACKAGES, *backends) else None)
    report = doctor.Report()

    doctor.check_versions(report)

    [finding] = report.findings
    assert all(name in finding.problem for name in backends)


def test_numbers_that_are_not_finite_are_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = encoder.TextEncoder.encode

    def spoiled(*arguments: Any) -> list[encoder.PromptEmbeds]:
        [embeds] = encode(*arguments)
        return [replace(embeds, hidden_states=np.full_like(embeds.hidden_states, np.nan))]

    monkeypatch.setattr(encoder.TextEncoder, "encode", spoiled)

    assert "NaN" in findings(capsys)[-1]["problem"]


def test_a_forward_pass_without_compiled_kernels_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("encoder.qwen3.forward.cpu_kernels", lambda: None)

    finding = findings(capsys)[-1]

    assert "No compiled kernels" in finding["problem"]
    assert "C compiler" in finding["next_step"]


def test_the_report_says_why_kernels_are_not_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("encoder.qwen3.forward.load_kernels", lambda: None)
    monkeypatch.setattr("encoder.qwen3.forward.cpu_kernels", cpu_kernels.__wrapped__)

    main(["doctor"])

    assert "no compiled kernels for this CPU" in capsys.readouterr().out


def test_without_mlx_the_report_says_so(tmp_path: Path) -> None:
    """`qwen3-encoder` itself cannot start then."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")

    process = subprocess.run(
        [sys.executable, "-m", "app.doctor"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert process.returncode == 1, process.stderr
    assert "mlx: ImportError: libmlx.so" in process.stdout
    assert "next: Install again" in process.stdout
    assert "instruction sets" in process.stdout


def test_the_home_directory_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report is made to be published."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QWEN3_ENCODER_CACHE_DIR", str(tmp_path / "models"))

    main(["doctor"])

    printed = capsys.readouterr().out
    assert str(tmp_path) not in printed
    assert "~/models" in printed
