"""The file that torch.load reads; with torch.load itself in tests/parity/test_dropins.py."""

import io
import pickletools
import zipfile

import numpy as np
import pytest

from app.reply import torch_file
from app.reply.torch_file import STORAGES
from app.wire import Tensor
from tests.app.reply.torch_file_reader import read_torch_file

# torch/_weights_only_unpickler.py, Unpickler.load: of the opcodes there, those that such a file needs.
SAFE_OPCODES = {
    *("PROTO", "GLOBAL", "MARK", "BINUNICODE", "BINPUT", "BININT", "BININT1", "BININT2", "LONG1", "NEWFALSE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPERSID", "BINGET", "REDUCE", "STOP"),
}


@pytest.mark.parametrize("shape", [(1,), (2, 3), (1, 512, 96), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", STORAGES)
def test_the_tensor_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    bits = np.arange(np.prod(shape), dtype=np.uint32 if dtype == "float32" else np.uint16).reshape(shape)
    tensor = Tensor(bits if dtype == "bfloat16" else bits.view("f4" if dtype == "float32" else "f2"), dtype)

    found = read_torch_file(torch_file.pack(tensor))

    assert (found.dtype, found.array.shape) == (dtype, shape)
    assert bytes(found.tobytes()) == bytes(tensor.tobytes())


def test_an_array_that_is_not_contiguous_is_written_in_order() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T

    np.testing.assert_array_equal(read_torch_file(torch_file.pack(Tensor(array, "float32"))).array, array)


def test_the_archive_has_the_records_that_torch_looks_for() -> None:
    archive = zipfile.ZipFile(io.BytesIO(torch_file.pack(Tensor(np.zeros(3, np.float32), "float32"))))

    assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert archive.read("archive/byteorder") == b"little"
    assert archive.read("archive/version") == b"3\n"


def test_the_pickle_stays_within_what_weights_only_allows() -> None:
    archive = zipfile.ZipFile(io.BytesIO(torch_file.pack(Tensor(np.zeros((2, 70_000), np.float32), "float32"))))

    opcodes = list(pickletools.genops(archive.read("archive/data.pkl")))

    assert {opcode.name for opcode, _, _ in opcodes} <= SAFE_OPCODES
    assert {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"} == {
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "collections OrderedDict",
    }


def test_the_same_tensor_gives_the_same_bytes() -> None:
    tensor = Tensor(np.arange(6, dtype=np.float32), "float32")

    assert torch_file.pack(tensor) == torch_file.pack(tensor)


def test_the_tensor_is_not_copied_into_the_file() -> None:
    array = np.zeros((2, 100_000), np.float32)

    parts = torch_file.pack_parts(Tensor(array, "float32"))

    assert [len(part) for part in parts if np.shares_memory(np.frombuffer(part, np.uint8), array)] == [800_000]
