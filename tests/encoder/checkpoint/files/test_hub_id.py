"""Names and addresses of models on the hub, as people write and copy them."""

import pytest

from encoder.checkpoint.files.hub_id import HubId


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/model", ("org/model", "", None)),
        ("org/model@v1.0/beta", ("org/model", "", "v1.0/beta")),
        ("org/model/text_encoder@main", ("org/model", "text_encoder", "main")),
        ("org/model/a/b.safetensors", ("org/model", "a/b.safetensors", None)),
        (" org/model/ \n", ("org/model", "", None)),
        ("https://huggingface.co/Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", "", None)),
        ("http://www.huggingface.co/Qwen/Qwen3-4B/", ("Qwen/Qwen3-4B", "", None)),
        ("https://huggingface.co/Qwen/Qwen3-4B?library=transformers#files", ("Qwen/Qwen3-4B", "", None)),
        ("https://huggingface.co/Qwen/Qwen3-4B.git", ("Qwen/Qwen3-4B", "", None)),
        ("git@hf.co:Qwen/Qwen3-4B", ("Qwen/Qwen3-4B", "", None)),
        ("https://hf-mirror.com/org/model/tree/main", ("org/model", "", "main")),
        ("https://mirror.local:8080/org/model", ("org/model", "", None)),
        ("https://huggingface.co/org/model/tree/v1.0/text_encoder/", ("org/model", "text_encoder", "v1.0")),
        ("https://huggingface.co/org/model/tree/refs%2Fpr%2F3", ("org/model", "", "refs/pr/3")),
        ("https://huggingface.co/org/model/tree/refs/pr/3/folder", ("org/model", "folder", "refs/pr/3")),
        ("https://huggingface.co/org/model/tree/feature%2Fx/folder", ("org/model", "folder", "feature/x")),
        ("https://huggingface.co/org/model/blob/main/a/b.safetensors", ("org/model", "a/b.safetensors", "main")),
        ("https://hf.co/org/model/resolve/main/b.gguf?download=true", ("org/model", "b.gguf", "main")),
        ("hf.co/org/model", ("org/model", "", None)),
        ("huggingface.co/org/model/blob/main/b.gguf", ("org/model", "b.gguf", "main")),
        ("hf://org/model", ("org/model", "", None)),
        ("hf://models/org/model@v1/b.gguf", ("org/model", "b.gguf", "v1")),
    ],
)
def test_hub_id_is_taken_apart(
    source: str, expected: tuple[str, str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.local:8080/")

    assert HubId.parse(source) == HubId(*expected)


@pytest.mark.parametrize("source", ["org", "./org/model", "org/model/../x", "/org/model", "org/.model", ""])
def test_path_is_no_hub_id(source: str) -> None:
    """Above all not a path that leads out of the snapshot."""
    assert HubId.parse(source) is None


@pytest.mark.parametrize(
    "source",
    [
        "https://example.com/org/model",
        "https://huggingface.co.example.com/org/model",
        "https://user@example.com/org/model",
        "https://modelscope.cn/models/org/model",
        "https://huggingface.co/org",
        "https://huggingface.co/",
        "https://huggingface.co/datasets/org/data",
        "https://huggingface.co/datasets/squad",
        "https://huggingface.co/org/model/discussions/3",
        "https://huggingface.co/org/model/tree/main/../../other",
        "https://huggingface.co/org/model/tree/main/%2e%2e/other",
        "https://huggingface.co/org/model/tree/main/%2Fetc",
        "ftp://huggingface.co/org/model",
        "hf://datasets/org/data",
    ],
)
def test_address_of_anything_else_is_no_hub_id(source: str) -> None:
    """Another host is not asked, nor is the hub asked for what is there."""
    assert HubId.parse(source) is None
