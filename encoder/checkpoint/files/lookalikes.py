"""What a file is that has the name of a model's file, and is not one."""

from pathlib import Path

from encoder.regular_file import open_file

_HEAD_BYTES = 512
_MAX_SAID = 60  # characters of a text that is shown


def explain_lookalike(file: Path, *, expects_text: bool = False) -> str | None:
    """What the file is and what to do, as the end of a message; None where nothing is known of it.

    Reads its first bytes. Raises OSError when it cannot be read.

    Args:
        file: that could not be read as what its name says.
        expects_text: whether text is nothing to wonder at, as it is in a *.json.
    """
    if file.with_name(f"{file.name}.aria2").exists():
        return f"is not whole: {file.name}.aria2 says that its download has not ended. Start that again to resume it."
    with open_file(file) as stream:
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
    if head[8:9] == b"{" and file.suffix.lower() == ".gguf":
        return "is a safetensors file. Rename it to *.safetensors."
    if head.startswith(b"PK\x03\x04") or head.startswith(b"\x80\x02"):
        return "is a PyTorch pickle or a zip archive. Pickle can run code and is not read: take the *.safetensors file."
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"Rar!")):
        return "is compressed. Unpack it first."
    if head[4:8] == b"\x00\x02\x00\x00" and head.startswith(b"\x00\x05\x16\x07"):
        return "holds the attributes that macOS keeps beside a file. Take the file without `._` before its name."
    if not head.strip(b"\0"):
        return "begins with zeros only. Was the download interrupted? Fetch it again."
    if expects_text or file.suffix.lower() == ".json" or head[8:9] == b"{" or head.startswith(b"GGUF"):
        return None
    if text.startswith((b"{", b"[")):
        return "is JSON text. Is it the index of a model, or the error message of a server? Fetch the file again."
    if len(head) > 8 and _is_text(head):  # fewer may be a magic number alone
        said = " ".join(head.decode(errors="replace").split())
        return f"is text that begins with {said[:_MAX_SAID]!r}. Is it the message of a server? Fetch the file again."
    return None


def _is_text(head: bytes) -> bool:
    """Whether it is UTF-8 without control characters, which the numbers at the start of a model's file are."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a letter that is cut off at the end
            return False
        text = head[: error.start].decode()
    return all(letter.isprintable() or letter in "\t\r\n" for letter in text)
