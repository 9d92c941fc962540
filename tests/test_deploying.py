"""The container and the unit for systemd: what they confine the service to, and that it works there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.app.running import Served

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "examples" / "systemd" / "qwen3-encoder.service"

# Runs a command without capabilities, where no file can be written but below $TMPDIR.
CONFINED = """
set -e
mount -t tmpfs -o noexec,nosuid,nodev,size=64m tmpfs "$TMPDIR"
awk -v tmp="$TMPDIR" '$2 != "/proc" && $2 != tmp { print $2 }' /proc/mounts |
    while read -r place; do mount -o remount,bind,ro "$place" 2>/dev/null || true; done
! touch "$HERE/written" 2>/dev/null
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@pytest.mark.parametrize("name", ["encoder", "encoder-cuda", "locust"])
def test_every_container_is_confined(name: str) -> None:
    service: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "privileged" not in service
    assert "network_mode" not in service


def test_the_image_ends_as_a_user_without_rights() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]

    assert [re.findall(r"^USER (.*)$", stage, re.MULTILINE) for stage in stages] == [[], ["1000"], ["1000"]]


def can_confine() -> bool:
    """Whether this user may make a file system read-only for one process."""
    if not (shutil.which("unshare") and shutil.which("setpriv") and os.geteuid() == 0):
        return False
    return subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_confine(), reason="needs root on Linux")
def test_the_service_writes_to_its_temporary_folder_alone(tmp_path: Path) -> None:
    """And needs no capability. Its home, its code and its working directory cannot be written."""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--disk-cache-dir", str(tmp_path / "results")]
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", CONFINED, "sh", *command],
        env={**os.environ, "TMPDIR": str(tmp), "HERE": str(tmp_path), "HOME": str(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        served = Served(process)
        try:
            reply = httpx.post(f"{served.url}/encode", json={"prompt": "a"}, timeout=60)
            status = Path(f"/proc/{process.pid}/status").read_text()
        finally:
            served.end()

    assert reply.status_code == 200, "".join(served.lines)
    assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_the_unit_is_confined() -> None:
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )

    assert judged.returncode == 0, judged.stdout + judged.stderr
