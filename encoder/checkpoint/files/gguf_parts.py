"""A GGUF model in several files, as llama-gguf-split writes it: `name-00001-of-00003.gguf` and so on.

The first file has the model's metadata; each file has some of its tensors.
Source: llama.cpp, tools/gguf-split/gguf-split.cpp; src/llama.cpp:llama_split_path.
"""

import re
from pathlib import Path

from encoder.checkpoint.files.gguf_header import GgufHeader, read_gguf_header
from encoder.errors import CheckpointError
from encoder.messages import listed, shown

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that the file `name` is a part of; `name` alone where it is no part."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def read_gguf_headers(file: Path) -> GgufHeader:
    """The header of a whole model, from any of its parts.

    Errors: CheckpointError when a part is damaged or missing, or the parts are not of one model.
    """
    header = read_gguf_header(file)
    count = header.metadata.get("split.count", 0)
    if count in (0, 1):
        return header
    files = [file.with_name(name) for name in part_names(file.name)]
    if len(files) != count:
        raise CheckpointError(
            f"{file}: is one of {shown(count)} parts, which its name does not say, expected one like "
            f"model-00001-of-00003.gguf. Rename the parts, or join them with llama-gguf-split --merge."
        )
    missing = [part.name for part in files if not part.is_file()]
    if missing:
        raise CheckpointError(f"{file}: the parts {listed(missing)} are missing. Fetch them too.")
    return _joined(files, [read_gguf_header(part) for part in files])


def _joined(files: list[Path], headers: list[GgufHeader]) -> GgufHeader:
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        found = header.metadata.get("split.no"), header.metadata.get("split.count")
        if found != (number, len(files)):
            raise CheckpointError(
                f"{file}: split.no and split.count are {shown(found)}, expected {(number, len(files))!r}. "
                f"Was it renamed?"
            )
    arrays = [array for header in headers for array in header.arrays]
    expected = headers[0].metadata.get("split.tensors.count", len(arrays))
    if len({array.key for array in arrays}) != len(arrays) or len(arrays) != expected:
        raise CheckpointError(
            f"{files[0]}: its parts hold {len(arrays):,} tensors, expected {shown(expected)} with different names. "
            f"Are all parts of one model?"
        )
    return GgufHeader(headers[0].metadata, arrays)
