"""What an operator is told exists: flags, metrics, error codes, files."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from app.errors import ANSWERS, OTHER_CODES
from app.main import create_app
from app.service import service_of
from app.settings import Settings, flag
from app.shutdown import LIMIT_S
from docs.parts import ROOT
from encoder import StateName

PAGE = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
ALERTS = ROOT / "examples" / "prometheus" / "alerts.yml"
UNIT = (ROOT / "examples" / "systemd" / "qwen3-encoder.service").read_text(encoding="utf-8")
PROMTOOL = shutil.which("promtool")


def test_every_flag_that_the_page_names_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))

    assert named - {flag(name) for name in Settings.model_fields} == set()


@pytest.mark.parametrize("text", [PAGE, ALERTS.read_text(encoding="utf-8")], ids=["page", "alerts"])
def test_every_metric_that_is_named_exists(text: str) -> None:
    known = set()
    for family in service_of(create_app(Settings())).metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count", ""]}.get(family.type, [""])
        known |= {family.name + suffix for suffix in suffixes}

    assert set(re.findall(r"qwen3_encoder_[a-z_]+[a-z]", text)) - known == set()


def test_every_code_that_the_page_names_exists_with_its_status() -> None:
    answers = {(str(status), code) for status, code in ANSWERS.values()} | {("500", code) for code in OTHER_CODES}
    rows = re.findall(r"^\| (\d{3}) ((?:`\w+`(?:, )?)+) \|", PAGE, flags=re.MULTILINE)
    named = {(status, code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}

    assert len(named) > 10
    assert named - answers == set()


def test_every_state_has_a_row() -> None:
    assert [state for state in get_args(StateName) if f"\n| `{state}` |" not in PAGE] == []


def test_the_unit_gives_the_service_the_time_that_it_may_take_to_end() -> None:
    [seconds] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, flags=re.MULTILINE)
    assert int(seconds) >= Settings().drain_timeout_s + LIMIT_S


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed; it is in Debian's package prometheus")
@pytest.mark.parametrize(
    ("command", "file"),
    [
        pytest.param("check", ALERTS, id="are valid rules"),
        pytest.param("test", ROOT / "tests" / "alerts_test.yml", id="fire when they should and not otherwise"),
    ],
)
def test_the_alerts(command: str, file: Path) -> None:
    ended = subprocess.run([str(PROMTOOL), command, "rules", str(file)], capture_output=True, text=True)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "SUCCESS" in ended.stdout
