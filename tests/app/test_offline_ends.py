"""`convert` and `encode -o` on full disks, and killed: one line, and nothing half-written is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.cli import main
from encoder.scratch import PREFIX, scratch_folder
from tests.app.running import PATIENCE_S, Spawn, wait_for

COMMANDS = [
    pytest.param(["convert", "demo", "{}/made"], id="convert"),
    pytest.param(["encode", "a cat", "-o", "{}/made.npy"], id="encode"),
    pytest.param(["encode", "a cat", "-o", "{}/made.safetensors"], id="encode safetensors"),
]


def arguments(command: list[str], folder: Path) -> list[str]:
    return [argument.format(folder) for argument in command]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one page."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=20", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line(
    command: list[str], small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder.checkpoint.loading.convert._check_disk", lambda *_: None)  # it fills up afterwards
    full = small_disk / "other"
    full.write_bytes(bytes(4096))

    code = main(arguments(command, small_disk))

    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert "made" in line or "No space left" in line
    assert list(small_disk.iterdir()) == [full]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_disk_is_one_line(
    command: list[str], small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encoder.checkpoint.loading.convert._check_disk", lambda *_: None)  # it is too small as well
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    code = main(arguments(command, small_disk))

    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert "Read-only file system" in line


def test_a_device_is_written_to_directly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full.npy").symlink_to("/dev/full")
    (tmp_path / "null.npy").symlink_to("/dev/null")

    assert main(["encode", "a cat", "-o", str(tmp_path / "full.npy")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert main(["encode", "a cat", "-o", str(tmp_path / "null.npy")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.npy", "null.npy"]


def test_a_file_is_replaced_whole_behind_its_link_with_its_permissions(tmp_path: Path) -> None:
    behind, link = tmp_path / "behind.npy", tmp_path / "link.npy"
    behind.write_bytes(b"old")
    behind.chmod(0o640)
    link.symlink_to(behind)

    assert main(["encode", "a cat", "-o", str(link)]) == 0
    assert link.is_symlink()
    assert behind.stat().st_mode & 0o777 == 0o640
    assert np.load(behind).shape == (1, 5, 32)


def test_a_folder_as_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made.npy").mkdir()

    assert main(["encode", "a cat", "-o", str(tmp_path / "made.npy")]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.fixture
def killed(spawn: Spawn, tmp_path: Path) -> Any:
    """Starts a conversion that stops before its end, and sends it a signal there."""
    code = (
        "import sys, time; from encoder.checkpoint.loading import convert; from app.cli import main; "
        "convert._config = lambda *_: time.sleep(1000); sys.exit(main(sys.argv[1:]))"
    )

    def start_and_kill(sig: int) -> tuple[int, str]:
        command = [sys.executable, "-c", code, "convert", "demo", str(tmp_path / "made")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: any(tmp_path.glob(f"{PREFIX}*/fresh/model*.safetensors")))
            process.send_signal(sig)
            _, log = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
        return process.returncode, log

    return start_and_kill


@pytest.mark.parametrize("sig", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_leaves_nothing(killed: Any, tmp_path: Path, sig: signal.Signals) -> None:
    code, log = killed(sig)

    assert code == 128 + sig
    assert log.splitlines()[-1] == f"error: ended by {sig.name}"
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_removes_what_a_kill_left_and_nothing_of_a_run_beside_it(killed: Any, tmp_path: Path) -> None:
    killed(signal.SIGKILL)
    [left] = tmp_path.iterdir()

    with scratch_folder(tmp_path) as beside:
        assert not left.exists()
        assert main(["encode", "a cat", "-o", str(tmp_path / "made.npy")]) == 0
        assert beside.exists()
    assert os.listdir(tmp_path) == ["made.npy"]
