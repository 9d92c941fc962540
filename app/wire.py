"""How tensors look on the wire: media types, bytes to arrays and back. Needs numpy and msgpack, nothing else.

bfloat16, which numpy lacks, is held as its uint16 bit pattern with the dtype's name beside it. All bytes are
little-endian and in C order.
"""

import base64
import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

Parts = list[bytes | memoryview]  # a body in pieces, a tensor's own memory among them

JSON = "application/json"
MSGPACK = "application/msgpack"
X_MSGPACK = "application/x-msgpack"
VND_MSGPACK = "application/vnd.msgpack"  # the one that IANA has registered
MSGPACKS = (MSGPACK, X_MSGPACK, VND_MSGPACK)  # three names of one format
SAFETENSORS = "application/x-safetensors"
TENSOR = "tensor/binary"  # diffusers, utils/remote_utils.py

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "bool": np.dtype("?"),
}
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "bool": "BOOL"}


class WireError(ValueError):
    """The bytes are not what their media type promises."""


@dataclass(frozen=True, slots=True)
class Written:
    """A value of a document that is given as parts of the body: in msgpack the bytes of a `bin`, in JSON its text."""

    parts: Collection[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array and the name of its dtype."""

    array: NDArray[Any]
    dtype: str

    def tobytes(self) -> memoryview:
        """The bytes as they travel; a view, no copy, where the array already lies in that order."""
        array = np.ascontiguousarray(self.array, dtype=NUMPY_DTYPES[self.dtype])
        return array.data.cast("B") if array.size else memoryview(b"")

    def float32(self) -> NDArray[Any]:
        """The numbers as float32; exact for every dtype on the wire."""
        if self.dtype == "bfloat16":  # the upper half of a float32
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)

    def numbers(self) -> NDArray[Any]:
        """The array with numbers that numpy can compute with: bool as it is, everything else as float32."""
        return self.array if self.dtype == "bool" else self.float32()

    @classmethod
    def frombytes(cls, data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> "Tensor":
        """A read-only array over `data`.

        Errors: WireError for an unknown dtype, or when the length does not follow from dtype and shape.
        """
        if dtype not in NUMPY_DTYPES:
            raise WireError(f"dtype {dtype!r} is unknown; known are {', '.join(NUMPY_DTYPES)}.")
        expected = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
        if min(shape, default=0) < 0 or len(data) != expected:
            raise WireError(f"{dtype} of shape {list(shape)} takes {expected} bytes, found {len(data)}.")
        return cls(np.frombuffer(data, NUMPY_DTYPES[dtype]).reshape(shape), dtype)


def pack(document: Mapping[str, Any]) -> bytes:
    """The document as msgpack, each Tensor as {dtype, shape, data}."""
    return b"".join(pack_parts(document))


def pack_parts(document: Mapping[str, Any]) -> Parts:
    """The bytes of `pack`, which are msgpack's own, without a copy of any tensor."""
    packer = msgpack.Packer(autoreset=False)
    parts: Parts = []
    _pack(document, packer, parts)
    return [*parts, packer.bytes()]


def _pack(value: Any, packer: Any, parts: Parts) -> None:
    """Append what comes before the bytes left in `packer`."""
    if isinstance(value, Tensor):
        packer.pack_map_header(3)
        for item in ("dtype", value.dtype, "shape", list(value.array.shape), "data"):
            packer.pack(item)
        value = Written((value.tobytes(),))
    if isinstance(value, Written):
        parts += [packer.bytes() + _bin_header(sum(map(len, value.parts))), *value.parts]
        packer.reset()
    elif isinstance(value, Mapping):
        packer.pack_map_header(len(value))
        for key, item in value.items():
            packer.pack(key)
            if is_in_parts(item):
                _pack(item, packer, parts)
            else:
                packer.pack(item)
    else:  # a list of objects
        packer.pack_array_header(len(value))
        for item in value:
            _pack(item, packer, parts)


def is_in_parts(value: Any) -> bool:
    """Whether a value of a document is written in parts: no list of numbers, and no string or number."""
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, IN_PARTS)


IN_PARTS = (Tensor, Written, dict)


def _bin_header(length: int) -> bytes:
    """Source: https://github.com/msgpack/msgpack/blob/master/spec.md, "bin format family"."""
    if length < 1 << 8:
        return struct.pack(">BB", 0xC4, length)
    return struct.pack(">BH", 0xC5, length) if length < 1 << 16 else struct.pack(">BI", 0xC6, length)


def unpack(body: bytes) -> dict[str, Any]:
    """Read back what `pack` wrote, each tensor as a Tensor."""
    return {key: _tensor(value) for key, value in msgpack.unpackb(body).items()}


def unpack_json(body: bytes) -> dict[str, Any]:
    """Read back the JSON of a reply: tensors in base64, or as nested lists of numbers."""
    return {key: _tensor(value) for key, value in json.loads(body).items()}


def _tensor(value: Any) -> Any:
    if not isinstance(value, dict) or "shape" not in value or "data" not in value:
        return value
    data, dtype, shape = value["data"], value["dtype"], tuple(value["shape"])
    if isinstance(data, list):
        return Tensor(
            np.asarray(data, dtype=bool if dtype == "bool" else np.float32), "bool" if dtype == "bool" else "float32"
        )
    return Tensor.frombytes(base64.b64decode(data) if isinstance(data, str) else data, dtype, shape)


def dump_json(document: object) -> bytes:
    """Compact JSON in UTF-8. ASCII only, so that a lone surrogate in a message cannot break the reply."""
    return ENCODER.encode(document).encode("ascii")


ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))  # making one takes longer than using it


def pack_safetensors(document: Mapping[str, Any]) -> bytes:
    """The tensors as a safetensors file, everything else in its metadata: strings as they are, other values as JSON.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    return b"".join(pack_safetensors_parts(document))


def pack_safetensors_parts(document: Mapping[str, Any]) -> Parts:
    """The bytes of `pack_safetensors`, without a copy of any tensor."""
    header: dict[str, Any] = {"__metadata__": {}}
    parts: Parts = []
    end = 0
    for key, value in sorted(document.items(), key=_widest_dtype_first):
        if not isinstance(value, Tensor):
            header["__metadata__"][key] = value if isinstance(value, str) else json.dumps(value)
            continue
        parts.append(value.tobytes())
        start, end = end, end + len(parts[-1])
        header[key] = {
            "dtype": SAFETENSORS_DTYPES[value.dtype],
            "shape": list(value.array.shape),
            "data_offsets": [start, end],
        }
    text = dump_json(header)
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8
    return [struct.pack("<Q", len(text)) + text, *parts]


def _widest_dtype_first(item: tuple[str, Any]) -> int:
    """Wide numbers first, so that each tensor starts on a multiple of its item size."""
    return -item[1].array.itemsize if isinstance(item[1], Tensor) else 0


def unpack_safetensors(body: bytes) -> dict[str, Any]:
    """Read back what `pack_safetensors` wrote; the metadata stays strings."""
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    data = memoryview(body)[8 + length :]
    names = {short: dtype for dtype, short in SAFETENSORS_DTYPES.items()}
    document: dict[str, Any] = dict(header.pop("__metadata__", {}))
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        document[key] = Tensor.frombytes(data[start:end], names[entry["dtype"]], tuple(entry["shape"]))
    return document


def tensor_headers(tensor: Tensor) -> dict[str, str]:
    """The response headers of a bare tensor, whose body is `Tensor.tobytes`.

    Source: diffusers, utils/remote_utils.py, postprocess_decode.
    """
    return {"shape": json.dumps(list(tensor.array.shape)), "dtype": tensor.dtype}


def unpack_tensor(body: bytes, headers: Mapping[str, str]) -> Tensor:
    """The tensor that such a reply holds."""
    return Tensor.frombytes(body, headers["dtype"], tuple(json.loads(headers["shape"])))
