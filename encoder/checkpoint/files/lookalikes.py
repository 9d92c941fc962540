"""What a file is that has the name of a model's file, and is not one."""

from pathlib import Path

_HEAD_BYTES = 512


def explain_lookalike(file: Path) -> str | None:
    """What the file is and what to do, as the end of a message; None where nothing is known of it.

    Reads its first bytes. Raises OSError when it cannot be read.
    """
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty. Was the download interrupted? Fetch it again."
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, which only names the real file. Fetch that with `git lfs pull` or `hf download`."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file. Fetch it again by its download link; a gated one needs HF_TOKEN."
    if head.startswith(b"GGUF") and file.suffix.lower() in (".safetensors", ".json"):
        return "is a GGUF file. Rename it to *.gguf."
    if head.startswith(b"PK\x03\x04") or head.startswith(b"\x80\x02"):
        return "is a PyTorch pickle or a zip archive. Pickle can run code and is not read: take the *.safetensors file."
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"Rar!")):
        return "is compressed. Unpack it first."
    if head[4:8] == b"\x00\x02\x00\x00" and head.startswith(b"\x00\x05\x16\x07"):
        return "holds the attributes that macOS keeps beside a file. Take the file without `._` before its name."
    if not head.strip(b"\0"):
        return "begins with zeros only. Was the download interrupted? Fetch it again."
    if file.suffix.lower() == ".json" or not text.startswith((b"{", b"[")) or head[8:9] == b"{":
        return None
    return "is JSON text. Is it the index of a model, or the error message of a server? Fetch the file again."
