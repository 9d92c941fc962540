"""The two tiers of the cache beside models of them that are too simple to be wrong."""

import os
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from encoder.serving.cache.folder import BLOCK_BYTES, UNFINISHED, DamagedResult, ResultFolder
from encoder.serving.cache.memory import MemoryCache, entry_bytes
from encoder.types import PromptEmbeds
from tests.encoder.serving.cache.test_folder import make_result
from tests.encoder.serving.cache.test_memory import make_job

JOBS = st.integers(0, 3)
SIZES = st.sampled_from([8, 400, 2000, 9000])
KEYS = st.sampled_from([letter * 64 for letter in "abc"])


class Memory(RuleBasedStateMachine):
    """An LRU of at most 10,000 bytes. The model is a dict whose last key was used last."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = MemoryCache(10_000)
        self.model: OrderedDict[int, PromptEmbeds] = OrderedDict()

    @rule(job=JOBS, size=SIZES, seed=st.integers(0, 9))
    def put(self, job: int, size: int, seed: int) -> None:
        result = make_result(seed, size)
        self.cache.put(make_job(job), result)
        if entry_bytes(make_job(job), result) > 10_000:
            return
        self.model.pop(job, None)
        self.model[job] = result
        while self.model_bytes() > 10_000:
            self.model.popitem(last=False)

    @rule(job=JOBS)
    def get(self, job: int) -> None:
        assert self.cache.get(make_job(job)) is self.model.get(job)
        if job in self.model:
            self.model.move_to_end(job)

    def model_bytes(self) -> int:
        return sum(entry_bytes(make_job(job), result) for job, result in self.model.items())

    @invariant()
    def bytes_are_counted_and_bounded(self) -> None:
        assert self.cache.bytes == self.model_bytes() <= self.cache.max_bytes
        assert len(self.cache) == len(self.model)


class Folder(RuleBasedStateMachine):
    """Two processes that share a folder of 16 blocks, while somebody damages and deletes its files.

    The model is what was last written under each key: a folder may forget it, and never says anything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.folders = [ResultFolder(self.path / "results", 16 * BLOCK_BYTES) for _ in range(2)]
        for folder in self.folders:
            folder.open()
        self.written: dict[str, PromptEmbeds] = {}
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.path)

    def file_of(self, key: str) -> Path:
        return self.path / "results" / f"{key}.safetensors"

    @rule(process=st.integers(0, 1), key=KEYS, size=SIZES, seed=st.integers(0, 9))
    def write(self, process: int, key: str, size: int, seed: int) -> None:
        self.written[key] = make_result(seed, size)
        self.folders[process].write(key, self.written[key])
        self.damaged.discard(key)

    @rule(process=st.integers(0, 1), key=KEYS)
    def read(self, process: int, key: str) -> None:
        try:
            result = self.folders[process].read(key)
        except DamagedResult:
            assert key in self.damaged
            assert not self.file_of(key).exists()
            return
        if result is not None:
            assert key not in self.damaged
            assert result.hidden_states.tobytes() == self.written[key].hidden_states.tobytes()

    @rule(process=st.integers(0, 1))
    def open(self, process: int) -> None:
        self.folders[process].open()

    @rule(key=KEYS, keep=st.floats(0, 0.99))
    def damage(self, key: str, keep: float) -> None:
        if self.file_of(key).exists():
            os.truncate(self.file_of(key), int(self.file_of(key).stat().st_size * keep))
            self.damaged.add(key)

    @rule(key=KEYS)
    def flip_a_bit(self, key: str) -> None:
        if self.file_of(key).exists() and key not in self.damaged:
            data = bytearray(self.file_of(key).read_bytes())
            data[-1] ^= 1
            self.file_of(key).write_bytes(data)
            self.damaged.add(key)

    @rule(key=KEYS, other=KEYS)
    def swap(self, key: str, other: str) -> None:
        if key != other and self.file_of(key).exists():
            shutil.copyfile(self.file_of(key), self.file_of(other))
            self.damaged.add(other)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        self.file_of(key).unlink(missing_ok=True)

    @rule()
    def delete_the_folder(self) -> None:
        shutil.rmtree(self.path / "results", ignore_errors=True)

    @rule()
    def make_the_folder(self) -> None:
        (self.path / "results").mkdir(exist_ok=True)

    @invariant()
    def no_unfinished_file_is_left(self) -> None:
        assert not list((self.path / "results").glob(f"{UNFINISHED}*"))

    @invariant()
    def the_bound_holds(self) -> None:
        """Each process counts anew after a sixteenth of the bound, so two of them exceed it by no more than that."""
        files = list((self.path / "results").glob("*.safetensors"))
        size = sum(-(-file.stat().st_size // BLOCK_BYTES) * BLOCK_BYTES for file in files)
        assert size <= 16 * BLOCK_BYTES * (1 + 2 / 16)


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
TestFolder = Folder.TestCase
TestFolder.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
