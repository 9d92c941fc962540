"""Writes what `torch.save(tensor)` writes, without PyTorch. `torch.load(file, weights_only=True)` reads it.

The file is a zip of uncompressed records: a pickle that builds the tensor, and the tensor's bytes. Nothing here reads a
pickle.
Source: torch/serialization.py, `_save` and `_load`; torch/_weights_only_unpickler.py for what a pickle may hold.
"""

import math
import pickle
import zipfile
from typing import IO, cast

from app.wire import Parts, Tensor

MEDIA_TYPE = "application/x-pytorch"
STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}
PROTOCOL = 2  # what torch.save writes and every reader knows


def pack(tensor: Tensor) -> bytes:
    """The tensor as a PyTorch file, to be loaded on the CPU."""
    return b"".join(pack_parts(tensor))


def pack_parts(tensor: Tensor) -> Parts:
    """The bytes of `pack`, without a copy of the tensor. It is read once, for its checksum."""
    records: dict[str, bytes | memoryview] = {
        "data.pkl": _pickle(tensor),
        "byteorder": b"little",
        "data/0": tensor.tobytes(),
        "version": b"3\n",
    }
    file = PartsFile()
    with zipfile.ZipFile(cast(IO[bytes], file), "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return [*file.parts.values()]


class PartsFile:
    """A file for zipfile to write, which keeps what is written without copying it.

    zipfile goes back to write the head of a record again, with its checksum, and writes as many bytes as before.

    Attributes:
        parts: what was written, by its place, in order.
    """

    def __init__(self) -> None:
        self.parts: dict[int, bytes | memoryview] = {}
        self._place = 0

    def write(self, data: bytes | memoryview) -> int:
        """Keep `data`, in place of what was written here before."""
        self.parts[self._place] = data
        self._place += len(data)
        return len(data)

    def tell(self) -> int:
        """Where the next write goes."""
        return self._place

    def seek(self, place: int) -> int:
        """Go to the beginning of an earlier write, or to the end."""
        self._place = place
        return place

    def seekable(self) -> bool:
        """Zipfile would write other records otherwise."""
        return True

    def flush(self) -> None:
        """Nothing is held back."""


def _pickle(tensor: Tensor) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, backward_hooks)`, as opcodes."""
    shape = tensor.array.shape
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    arguments = (
        _storage(tensor)
        + _value(0)
        + _value(shape)
        + _value(stride)
        + _value(False)
        + _global("collections", "OrderedDict")
        + pickle.EMPTY_TUPLE
        + pickle.REDUCE
    )
    rebuild = _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE
    return pickle.PROTO + bytes([PROTOCOL]) + rebuild + pickle.STOP


def _storage(tensor: Tensor) -> bytes:
    """The persistent id of the record `data/0`: ("storage", class, record, device, number of elements)."""
    kind = _value("storage") + _global("torch", STORAGES[tensor.dtype])
    place = _value("0") + _value("cpu") + _value(tensor.array.size)
    return pickle.MARK + kind + place + pickle.TUPLE + pickle.BINPERSID


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _value(value: object) -> bytes:
    """The opcodes that push a plain value: its pickle without PROTO, version and STOP."""
    return pickle.dumps(value, PROTOCOL)[2:-1]
