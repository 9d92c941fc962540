"""Models in Ollama's store, in the forms of both eras."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, Lora, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.files.ollama_store import ADAPTER, GGUF, manifest_file
from encoder.checkpoint.readers import ollama
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from tests.checkpoints import Array, write_checkpoint, write_json
from tests.encoder.checkpoint.gguf_files import DIMS as GGUF_DIMS
from tests.encoder.checkpoint.gguf_files import write_gguf
from tests.encoder.checkpoint.lora_files import kohya, make_pairs, write_gguf_lora, write_lora
from tests.encoder.checkpoint.ollama_store import DIMS, TENSOR, TYPES, Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def all_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit holds for one kernel: bfloat16 matrices may have another, which adds up in another order."""
    monkeypatch.setattr("encoder.text_encoder.widens_bfloat16", lambda config: False)


def encode(source: str) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(source, compute_dtype="float32"))
    return [embeds.hidden_states for embeds in encoder.encode(["a cat", "a red sofa"], LAST_HIDDEN_STATE, "float32")]


@pytest.mark.parametrize("era", ["three-blobs", "one-blob"])
@pytest.mark.parametrize("quant_type", [None, *TYPES])
def test_hidden_states_are_those_of_the_decoded_weights(store: Store, era: str, quant_type: str | None) -> None:
    """Bit for bit. mxfp8 has the shapes of 4-bit groups of 64, which is what Ollama's own reader took it for."""
    store.add_json()
    store.add_weights(lambda name: quant_type, era)
    store.write_manifest()

    for ours, expected in zip(encode("ollama:z-image-turbo"), encode(str(store.plain)), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_types_may_differ_from_tensor_to_tensor(store: Store) -> None:
    """Ollama gives some layers more bits."""
    kinds = iter(list(TYPES) * 10)
    store.add_json()
    store.add_weights(lambda name: next(kinds), "one-blob")
    store.write_manifest()

    for ours, expected in zip(encode("z-image-turbo"), encode(str(store.plain)), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_tokens_declared_beside_tokenizer_json_count(store: Store) -> None:
    """As in a folder: its layers are the same files."""
    store.weights = write_checkpoint(store.plain, **DIMS, vocab_size=283)
    write_json(store.plain / "tokenizer_config.json", {"extra_special_tokens": ["<loc>"]})
    store.add_json()
    store.add_weights(lambda name: None, "one-blob")
    store.write_manifest()

    tokenizer = open_checkpoint(ModelOptions("ollama:z-image-turbo")).tokenizer

    assert tokenizer.tokenize("<loc>", max_length=9) == ((282,), False)


@pytest.mark.parametrize("base", ["tensors", "gguf"])
def test_adapter_of_a_model_is_merged(store: Store, tmp_path: Path, base: str) -> None:
    """A Modelfile with ADAPTER makes a layer of it. It is checked against its hash, as all blobs are."""
    if base == "gguf":
        weights: dict[str, Array] = dict(write_checkpoint(store.plain, **GGUF_DIMS))
        write_gguf(tmp_path / "model.gguf", weights)
        store.add(GGUF, "", (tmp_path / "model.gguf").read_bytes())
    else:
        store.add_json()
        store.add_weights(lambda name: None, "one-blob")
        weights = {name: weight.astype(np.float32) for name, weight in store.weights.items()}
    pairs = make_pairs(weights)
    blob = store.add(ADAPTER, "", write_gguf_lora(tmp_path / "lora.gguf", pairs).read_bytes())
    store.write_manifest()
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs))
    options = ModelOptions(str(store.plain), loras=(Lora(str(file)),), compute_dtype="float32")
    [expected] = TextEncoder.open(options).encode(["a cat"], LAST_HIDDEN_STATE, "float32")

    found = encode("ollama:z-image-turbo")[0]

    np.testing.assert_allclose(found, expected.hidden_states, rtol=0, atol=1e-5 * np.abs(found).max())
    blob.write_bytes(blob.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match="has the hash"):
        encode("ollama:z-image-turbo")


def test_adapter_that_does_not_fit_is_refused(store: Store, tmp_path: Path) -> None:
    store.add_json()
    store.add_weights(lambda name: None, "one-blob")
    store.add(ADAPTER, "", b"ggla" + bytes([1, 0, 0, 0] * 8))  # as llama.cpp wrote LoRAs before GGUF
    store.write_manifest()

    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        open_checkpoint(ModelOptions("z-image-turbo"))


def test_language_model_has_no_component(store: Store) -> None:
    """Its layers have no text_encoder/ in front of their names."""
    store.component = ""
    store.add_json(tokenizer="")
    store.add_weights(lambda name: "int8", "one-blob")
    store.write_manifest("registry.ollama.ai/library/qwen3/4b-mlx")

    assert open_checkpoint(ModelOptions("qwen3:4b-mlx")).quantization == "affine 8-bit in groups of 64"


@pytest.mark.parametrize(
    ("source", "manifest"),
    [
        ("z-image-turbo", "registry.ollama.ai/library/z-image-turbo/latest"),
        ("z-image-turbo:fp8", "registry.ollama.ai/library/z-image-turbo/fp8"),
        ("x/flux2-klein:4b", "registry.ollama.ai/x/flux2-klein/4b"),
        ("hub.example.com:5000/x/klein", "hub.example.com:5000/x/klein/latest"),
    ],
)
def test_name_leads_to_its_manifest(store: Store, source: str, manifest: str) -> None:
    """Host, namespace and tag have defaults."""
    assert manifest_file(source) == store.root / "manifests" / manifest


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "a/../b",
        "..",
        ".",
        "",
        "a:../b",
        "a//b",
        "a/b/c/d",
        "/etc/passwd",
        "a\0b",
        "a:b:c",
        "x" * 90,
    ],
)
def test_name_cannot_lead_out_of_the_store(store: Store, name: str) -> None:
    """Names come from outside and become paths."""
    assert manifest_file(name) is None
    with pytest.raises(CheckpointError, match="is no model of Ollama's store"):
        open_checkpoint(ModelOptions(f"ollama:{name}"))


@pytest.mark.parametrize("digest", ["sha256:../../secret", "sha256:" + "a" * 63, "md5:" + "a" * 64, 7, None])
def test_digest_cannot_lead_out_of_the_store(store: Store, digest: object) -> None:
    """A manifest is data from strangers."""
    store.layers.append({"mediaType": TENSOR, "digest": digest, "size": 1, "name": "x"})
    store.write_manifest()

    with pytest.raises(CheckpointError, match="expected a sha256 digest"):
        open_checkpoint(ModelOptions("ollama:z-image-turbo"))


def test_missing_blob_is_named(store: Store) -> None:
    """An interrupted pull."""
    store.add_json()
    store.add(TENSOR, "text_encoder/model.norm.weight", b"x").unlink()
    store.write_manifest()

    with pytest.raises(CheckpointError, match=r"of text_encoder/model.norm.weight is missing. Pull the model again"):
        open_checkpoint(ModelOptions("ollama:z-image-turbo"))


def test_blob_that_is_not_what_its_digest_says_is_named(store: Store) -> None:
    """A disk that forgets, or somebody who changed a weight."""
    store.add_json()
    store.add_weights(lambda name: None, "one-blob")
    store.write_manifest()
    blob = store.root / "blobs" / str(store.layers[-1]["digest"]).replace(":", "-")
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")

    with pytest.raises(CheckpointError, match=f"{blob.name}: has the hash"):
        open_checkpoint(ModelOptions("ollama:z-image-turbo"))


def test_large_blob_is_compared_with_its_digest_when_it_is_loaded(store: Store) -> None:
    """`inspect` must not hash gigabytes."""
    store.weights = write_checkpoint(store.plain, **DIMS, vocab_size=6000)
    store.add_json()
    store.add_weights(lambda name: None, "one-blob")
    store.write_manifest()
    [large] = [layer for layer in store.layers if layer["size"] > 2**20]
    blob = store.root / "blobs" / str(large["digest"]).replace(":", "-")
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")

    assert open_checkpoint(ModelOptions("ollama:z-image-turbo")).config.vocab_size == 6000
    with pytest.raises(CheckpointError, match=f"{blob.name}: has the hash"):
        TextEncoder.open(ModelOptions("ollama:z-image-turbo"))


@pytest.mark.parametrize("layers", [None, [], {}, ["x"], [None], [{"digest": {}}]])
def test_damaged_manifest_is_named(store: Store, layers: Any) -> None:
    """No traceback."""
    store.layers = layers
    manifest = store.write_manifest()

    with pytest.raises(CheckpointError, match=str(manifest)):
        open_checkpoint(ModelOptions("ollama:z-image-turbo"))


def test_model_that_is_not_pulled_says_where_it_was_looked_for(store: Store) -> None:
    """The store may be elsewhere."""
    with pytest.raises(CheckpointError, match=f"expected {store.root}/manifests/.*Pull it first"):
        open_checkpoint(ModelOptions("ollama:z-image-turbo"))


def test_gguf_in_the_store_is_read(store: Store) -> None:
    """Most models that people have pulled are GGUF."""
    store.weights = write_checkpoint(store.plain, hidden_size=256, intermediate_size=256, head_dim=64)
    write_gguf(store.root.parent / "model.gguf", store.weights, "Q8_0")
    content = (store.root.parent / "model.gguf").read_bytes()
    store.add("application/vnd.ollama.image.model", "", content)
    store.write_manifest("registry.ollama.ai/library/qwen3/0.6b")

    for ours, expected in zip(encode("qwen3:0.6b"), encode(str(store.root.parent / "model.gguf")), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_gguf_in_the_store_is_hashed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its tensors is in the same gigabytes."""
    store.weights = write_checkpoint(store.plain, hidden_size=256, intermediate_size=256, head_dim=64)
    write_gguf(store.root.parent / "model.gguf", store.weights, "Q8_0")
    store.add("application/vnd.ollama.image.model", "", (store.root.parent / "model.gguf").read_bytes())
    store.write_manifest("registry.ollama.ai/library/qwen3/0.6b")
    hashed: list[Path] = []
    monkeypatch.setattr(ollama, "check_digest", hashed.append)

    encode("qwen3:0.6b")
    assert len(hashed) == 1


def test_folder_goes_before_a_model_of_the_same_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user sees the folder, and can still name the model as ollama:z-image-turbo."""
    store.add_json()
    store.add_weights(lambda name: None, "one-blob")
    store.write_manifest()
    write_checkpoint(tmp_path / "here" / "z-image-turbo")
    monkeypatch.chdir(tmp_path / "here")

    [file] = {tensor.file for tensor in open_checkpoint(ModelOptions("z-image-turbo")).weights.tensors.values()}
    assert file.name == "model.safetensors"
