"""Reads a torch file without PyTorch."""

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

from app.reply.torch_file import STORAGES
from app.wire import Tensor


class Reader(pickle.Unpickler):
    """Reads our files the way torch.load does, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        super().__init__(io.BytesIO(archive.read("archive/data.pkl")))
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        known = {("torch._utils", "_rebuild_tensor_v2"): rebuild, ("collections", "OrderedDict"): OrderedDict}
        known |= {("torch", storage): dtype for dtype, storage in STORAGES.items()}
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, int, bytes]:
        kind, dtype, key, device, numel = pid
        assert (kind, device) == ("storage", "cpu")
        return dtype, numel, self.archive.read(f"archive/data/{key}")


def rebuild(
    storage: tuple[str, int, bytes], offset: int, shape: Any, stride: Any, requires_grad: bool, hooks: Any
) -> Tensor:
    dtype, numel, data = storage
    tensor = Tensor.frombytes(data, dtype, shape)
    assert tensor.array.size == numel
    assert tuple(step // tensor.array.itemsize for step in tensor.array.strides) == stride
    assert (offset, requires_grad, hooks) == (0, False, OrderedDict())
    return tensor


def read_torch_file(file: bytes) -> Tensor:
    tensor = Reader(zipfile.ZipFile(io.BytesIO(file))).load()
    assert isinstance(tensor, Tensor)
    return tensor
