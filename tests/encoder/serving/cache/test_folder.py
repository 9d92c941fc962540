"""The files of cached results: what happens to them, and to whoever reads them."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

from encoder.serving.cache.folder import UNFINISHED, UNFINISHED_S, DamagedResult, ResultFolder
from encoder.types import DType, PromptEmbeds

A, B, C, D = (letter * 64 for letter in "abcd")
SIZE = 10_000  # numbers of a result
ON_DISK = 20_480  # bytes of its file, in whole blocks


def make_result(seed: int = 0, size: int = SIZE, dtype: DType = "bfloat16", rows_axis: int = 0) -> PromptEmbeds:
    numpy_dtype = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[dtype]
    numbers = np.random.default_rng(seed).integers(0, 1000, (2, size // 2)).astype(numpy_dtype)
    return PromptEmbeds(numbers, np.array([True, False]), dtype, rows_axis)


def assert_equal(result: PromptEmbeds | None, expected: PromptEmbeds) -> None:
    assert result is not None
    assert (result.dtype, result.rows_axis) == (expected.dtype, expected.rows_axis)
    for name in ("hidden_states", "attention_mask"):
        array, wanted = getattr(result, name), getattr(expected, name)
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


def make_folder(path: Path, max_bytes: int = 2**30) -> ResultFolder:
    folder = ResultFolder(path, max_bytes)
    folder.open()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> ResultFolder:
    """With room for everything."""
    return make_folder(tmp_path / "results")


def file_of(folder: ResultFolder, key: str) -> Path:
    return folder.path / f"{key}.safetensors"


def age(folder: ResultFolder, key: str, seconds: int) -> None:
    """Make a result look as if it was last used so long ago."""
    then = time.time() - seconds
    os.utime(file_of(folder, key), (then, then))


def names(folder: ResultFolder) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in folder.path.iterdir()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("rows_axis", [0, 1])
def test_a_result_comes_back_as_it_was(folder: ResultFolder, dtype: DType, rows_axis: int) -> None:
    result = make_result(dtype=dtype, rows_axis=rows_axis)
    folder.write(A, result)

    assert_equal(folder.read(A), result)
    assert folder.read(B) is None


def test_a_result_without_rows_comes_back(folder: ResultFolder) -> None:
    result = PromptEmbeds(np.zeros((0, 32), np.uint16), np.zeros(0, np.bool_), "bfloat16")
    folder.write(A, result)

    assert_equal(folder.read(A), result)


def test_a_file_is_plain_safetensors_with_its_key(folder: ResultFolder) -> None:
    result = make_result()
    folder.write(A, result)

    with safe_open(file_of(folder, A), framework="numpy") as file:
        assert file.metadata()["key"] == A
        np.testing.assert_array_equal(file.get_tensor("hidden_states"), result.hidden_states)


def test_files_and_folder_are_for_their_owner_alone(folder: ResultFolder) -> None:
    """They reveal the prompts."""
    folder.write(A, make_result())

    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(file_of(folder, A).stat().st_mode) == 0o600


def test_another_process_finds_the_result(folder: ResultFolder) -> None:
    folder.write(A, make_result(7))

    assert_equal(make_folder(folder.path).read(A), make_result(7))


def test_a_newer_result_takes_the_place_of_the_old_one(folder: ResultFolder) -> None:
    folder.write(A, make_result(1))
    folder.write(A, make_result(2))

    assert_equal(folder.read(A), make_result(2))
    assert names(folder) == {A}


def test_the_least_recently_used_results_go_first(tmp_path: Path) -> None:
    """A result that was read is used, and so is one that was touched."""
    folder = make_folder(tmp_path, max_bytes=4 * ON_DISK)
    for seconds, key in enumerate((A, B, C, D)):
        folder.write(key, make_result())
        age(folder, key, 100 - seconds)
    folder.read(A)
    folder.touch([B])
    folder.write("e" * 64, make_result())

    assert names(folder) == {A, B, "e" * 64}
    assert folder.evictions == 2
    assert folder.bytes == 3 * ON_DISK


def test_a_folder_never_grows_over_its_bound(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, max_bytes=50 * ON_DISK)
    sizes = []
    for number in range(120):
        folder.write(f"{number:064x}", make_result())
        sizes.append(sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()))

    assert max(sizes) <= 50 * ON_DISK
    assert len(names(folder)) >= 45
    assert f"{119:064x}" in names(folder)


def test_a_folder_is_not_counted_for_each_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes time for each file in it."""
    counted = 0
    scandir = os.scandir

    def count(path: Path) -> object:
        nonlocal counted
        counted += 1
        return scandir(path)

    monkeypatch.setattr("os.scandir", count)
    folder = make_folder(tmp_path, max_bytes=160 * ON_DISK)
    for number in range(320):
        folder.write(f"{number:064x}", make_result())

    assert counted < 320 / 6


def test_bytes_of_other_processes_count_towards_the_bound(tmp_path: Path) -> None:
    ours, theirs = (make_folder(tmp_path, max_bytes=20 * ON_DISK) for _ in range(2))
    for number in range(18):
        theirs.write(f"{number:064x}", make_result())
    for number in range(18, 24):
        ours.write(f"{number:064x}", make_result())

    assert len(names(ours)) <= 20


def test_a_smaller_bound_evicts_at_the_next_start(folder: ResultFolder) -> None:
    for number in range(10):
        folder.write(f"{number:064x}", make_result())
        age(folder, f"{number:064x}", 100 - number)

    smaller = make_folder(folder.path, max_bytes=4 * ON_DISK)

    assert names(smaller) == {f"{number:064x}" for number in (7, 8, 9)}


def test_a_result_larger_than_the_folder_drops_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, max_bytes=2 * ON_DISK)
    folder.write(A, make_result())
    folder.write(B, make_result(size=10 * SIZE))

    assert names(folder) == {A}


def rewritten(data: bytes, **changes: str) -> bytes:
    """The same tensors under other metadata."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return save(load(data), header["__metadata__"] | changes)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "three bytes": lambda data: data[:3],
    "cut off in the header": lambda data: data[:100],
    "cut off in the data": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "one bit of a number": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "one bit of the mask": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "one bit of the header": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
    "no safetensors": lambda data: b"PK\3\4" * 1000,
    "a pickle": lambda data: b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K*.",
    "no metadata": lambda data: save(load(data)),
    "another key": lambda data: rewritten(data, key=B),
    "another dtype": lambda data: rewritten(data, dtype="float16"),
    "another axis": lambda data: rewritten(data, rows_axis="1"),
    "no axis": lambda data: rewritten(data, rows_axis="x"),
    "another shape": lambda data: data.replace(b'"shape":[2,5000]', b'"shape":[5000,2]'),
    "another dtype of the numbers": lambda data: data.replace(b'"U16"', b'"F16"'),
    "a dtype that NumPy lacks": lambda data: data.replace(b'"U16"', b'"BF16"').replace(b"  ", b" ", 1),
    "other tensors": lambda data: save({"x": np.zeros(3)}, {"key": A}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_deleted_and_never_used(folder: ResultFolder, damage: Callable[[bytes], bytes]) -> None:
    folder.write(A, make_result())
    whole = file_of(folder, A).read_bytes()
    assert damage(whole) != whole
    file_of(folder, A).write_bytes(damage(whole))

    with pytest.raises(DamagedResult, match=r"aaa.* was damaged and is deleted"):
        folder.read(A)

    assert names(folder) == set()
    assert folder.read(A) is None


def test_every_changed_byte_is_found(folder: ResultFolder) -> None:
    result = make_result(size=8)
    folder.write(A, result)
    whole = file_of(folder, A).read_bytes()
    for position in range(len(whole)):
        file_of(folder, A).write_bytes(whole[:position] + bytes([whole[position] ^ 32]) + whole[position + 1 :])
        try:
            read = folder.read(A)
        except DamagedResult:
            continue
        assert_equal(read, result)  # blanks at the end of the header may be any


def test_a_file_of_another_key_is_not_taken_for_ours(folder: ResultFolder) -> None:
    folder.write(B, make_result())
    file_of(folder, B).rename(file_of(folder, A))

    with pytest.raises(DamagedResult):
        folder.read(A)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, max_bytes=2 * ON_DISK)
    others = [tmp_path / "notes.txt", tmp_path / "model.safetensors", tmp_path / f"{A}.safetensors.bak"]
    for other in others:
        other.write_bytes(b"x" * 100_000)
    for key in (A, B, C):
        folder.write(key, make_result())

    assert all(other.exists() for other in others)
    assert folder.bytes <= 2 * ON_DISK


def test_the_unfinished_file_of_a_killed_process_is_removed_later(folder: ResultFolder) -> None:
    old, young = (folder.path / f"{UNFINISHED}{name}" for name in ("old", "young"))
    for file in (old, young):
        file.write_bytes(b"half")
    then = time.time() - UNFINISHED_S - 10
    os.utime(old, (then, then))

    make_folder(folder.path)

    assert not old.exists()
    assert young.exists()


def test_a_deleted_folder_is_made_anew_for_its_owner_alone(folder: ResultFolder) -> None:
    folder.write(A, make_result())
    shutil.rmtree(folder.path)

    assert folder.read(A) is None
    folder.write(B, make_result())
    assert_equal(folder.read(B), make_result())
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert (folder.entries, folder.bytes) == (1, ON_DISK)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=["FIFO", "device"])
def test_what_is_no_file_is_damaged_and_not_waited_for(folder: ResultFolder, make: Callable[[Path], None]) -> None:
    make(file_of(folder, A))

    with pytest.raises(DamagedResult):
        folder.read(A)
    assert not file_of(folder, A).exists()


def test_a_file_larger_than_the_folder_may_be_is_not_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 2 * ON_DISK)
    with file_of(folder, A).open("wb") as file:
        file.truncate(2**40)

    with pytest.raises(DamagedResult):
        folder.read(A)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_still_answers(folder: ResultFolder) -> None:
    folder.write(A, make_result())
    file_of(folder, B).write_bytes(b"damaged")
    folder.path.chmod(0o500)
    try:
        assert_equal(folder.read(A), make_result())
        with pytest.raises(DamagedResult):
            folder.read(B)
        with pytest.raises(PermissionError):
            folder.write(C, make_result())
        make_folder(folder.path)
    finally:
        folder.path.chmod(0o700)

    assert names(folder) == {A, B}


def test_a_full_disk_leaves_nothing_unfinished(folder: ResultFolder) -> None:
    """Played by the limit on the size of a file, which is met in the middle of writing, too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            folder.write(A, make_result())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert names(folder) == set()
    assert folder.bytes == 0


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from tests.encoder.serving.cache.test_folder import make_folder, make_result
folder = make_folder(Path(sys.argv[1]), 2**30)
print("started", flush=True)
number = 0
while True:
    folder.write(f"{number:064x}", make_result(number, size=200_000))
    number += 1
"""


def test_a_kill_while_writing_leaves_whole_results_alone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.safetensors"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    folder = make_folder(tmp_path)
    for number in range(folder.entries):
        assert_equal(folder.read(f"{number:064x}"), make_result(number, size=200_000))


def use(path: Path, seed: int) -> tuple[int, int]:
    """Read and write keys that others use too; how many were found, and how many were wrong."""
    folder = make_folder(path, max_bytes=6 * ON_DISK)
    chosen = np.random.default_rng(seed).integers(0, 12, 200)
    found = wrong = 0
    for number in map(int, chosen):
        result = folder.read(f"{number:064x}")
        if result is None:
            folder.write(f"{number:064x}", make_result(number))
            continue
        found += 1
        wrong += not np.array_equal(result.hidden_states, make_result(number).hidden_states)
    return found, wrong


def test_processes_that_share_a_folder_read_no_wrong_result(tmp_path: Path) -> None:
    """They read, write and evict the same few keys."""
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        outcomes = pool.starmap(use, [(tmp_path, seed) for seed in range(3)])

    assert all(found for found, _ in outcomes)
    assert sum(wrong for _, wrong in outcomes) == 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= (6 + 3) * ON_DISK
