"""GGUF files, written by the gguf package, read back to the same tensors, tokens and hidden states."""

import json
import math
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from encoder import LAST_HIDDEN_STATE, Preset, TextEncoder
from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import ModelOptions
from encoder.pipeline.tokenizer import tokenize
from encoder.presets.built_in import get_preset
from tests.checkpoints import Array, write_checkpoint, write_tensors
from tests.encoder.checkpoint.gguf_files import DIMS, QUANTIZED, RANDOM, demo_tokens, gguf_tokens, write_gguf


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Any]:
    return write_checkpoint(tmp_path / "plain", **DIMS)


@pytest.fixture(autouse=True)
def all_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit holds for one kernel: bfloat16 matrices may have another, which adds up in another order."""
    monkeypatch.setattr("encoder.text_encoder.widens_bfloat16", lambda config: False)


def encode(source: Path, **options: Any) -> list[Array]:
    encoder = TextEncoder.open(ModelOptions(str(source), compute_dtype="float32", **options))
    return [embeds.hidden_states for embeds in encoder.encode(["a cat", "a red sofa"], LAST_HIDDEN_STATE, "float32")]


@pytest.mark.parametrize("kind", ["F32", *QUANTIZED, *RANDOM])
def test_hidden_states_are_those_of_the_decoded_weights(tmp_path: Path, weights: dict[str, Any], kind: str) -> None:
    """Bit for bit, config and tokenizer taken from the file itself."""
    decoded = write_gguf(tmp_path / "model.gguf", weights, kind)
    write_tensors(tmp_path / "plain", {f"model.{name}": array for name, array in decoded.items()})

    for ours, expected in zip(encode(tmp_path / "model.gguf"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_kept_quantized_the_hidden_states_are_the_same(tmp_path: Path, weights: dict[str, Any], kind: str) -> None:
    """Three types are MLX's affine in another order; the others are decoded all the same."""
    write_gguf(tmp_path / "model.gguf", weights, kind)
    kept = encode(tmp_path / "model.gguf", quantize="keep")

    for ours, expected in zip(kept, encode(tmp_path / "model.gguf"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-4)


def test_checkpoint_is_described(tmp_path: Path, weights: dict[str, Any]) -> None:
    """What `inspect` prints."""
    write_gguf(tmp_path / "model.gguf", weights, "Q6_K")
    write_gguf(tmp_path / "renamed.gguf", weights, "Q6_K")
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path / "model.gguf")))

    assert checkpoint.quantization == "Q6_K"
    assert checkpoint.dtype == "bfloat16"
    assert (checkpoint.config.rope_theta, checkpoint.config.rms_norm_eps) == (1e6, 1e-6)
    assert checkpoint.tokenizer.pad_token == "<|endoftext|>"
    assert checkpoint.fingerprint == open_checkpoint(ModelOptions(str(tmp_path / "renamed.gguf"))).fingerprint


def test_floats_have_the_fingerprint_of_the_same_floats_elsewhere(tmp_path: Path, weights: dict[str, Any]) -> None:
    """It follows the content, not the format."""
    write_gguf(tmp_path / "model.gguf", weights)

    assert (
        open_checkpoint(ModelOptions(str(tmp_path / "model.gguf"))).fingerprint
        == open_checkpoint(ModelOptions(str(tmp_path / "plain"))).fingerprint
    )


TEXTS = [
    "a cat", "A photo of 3 cats, don't they'LL", "  two  blanks ", "\n\na newline\r\n", "naïve café", "cafe\u0301",
    "一只猫坐在红沙发上", "🐈‍⬛ cat", "<|im_start|>user\nhi<|im_end|>", "<think>\n\n</think>", "x\t\ty", "", "1234567",
]  # fmt: skip


def test_tokens_are_those_of_the_tokenizer_that_was_converted(tmp_path: Path, weights: dict[str, Any]) -> None:
    """Byte pairs, added tokens, normalization and the split into words."""
    trained = train_tokenizer()
    trained.save(str(tmp_path / "tokenizer.json"))
    vocab_size = trained.get_vocab_size(with_added_tokens=True)
    weights = write_checkpoint(tmp_path / "plain", **DIMS, vocab_size=vocab_size)
    tokens = gguf_tokens(json.loads((tmp_path / "tokenizer.json").read_text()))
    write_gguf(tmp_path / "model.gguf", weights, tokens=tokens)
    tokenizer = open_checkpoint(ModelOptions(str(tmp_path / "model.gguf"))).tokenizer

    assert len(tokens["merges"]) > 100
    for text in TEXTS:
        assert list(tokenizer.tokenize(text, max_length=10_000)[0]) == trained.encode(text).ids, text


def tokens_around(file: Path) -> tuple[int, ...]:
    """The ids that are added to a text of no letters."""
    return open_checkpoint(ModelOptions(str(file))).tokenizer.tokenize("", max_length=9)[0]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        pytest.param({}, (), id="no-flag"),
        pytest.param({"eos_token_id": 256}, (), id="id-without-a-flag"),
        pytest.param({"add_eos_token": False, "eos_token_id": 256}, (), id="false"),
        pytest.param({"add_eos_token": True, "eos_token_id": 256}, (256,), id="end-of-qwen3-embedding"),
        pytest.param({"add_eos_token": True, "eos_token_id": 258}, (258,), id="another-end"),
        pytest.param({"add_bos_token": True, "bos_token_id": 257}, (257,), id="beginning"),
        pytest.param(
            {"add_bos_token": True, "add_eos_token": True, "bos_token_id": 257, "eos_token_id": 257},
            (257, 257),
            id="both-the-same",
        ),
    ],
)
def test_tokens_are_added_around_a_text_as_the_flags_say(
    tmp_path: Path, weights: dict[str, Any], flags: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """As llama.cpp adds them. Qwen3-Embedding ends every text with <|endoftext|>."""
    metadata = {f"tokenizer__ggml__{key}": value for key, value in flags.items()}
    write_gguf(tmp_path / "model.gguf", weights, **metadata)

    assert tokens_around(tmp_path / "model.gguf") == expected


def test_a_merge_of_what_is_no_token_is_refused(tmp_path: Path, weights: dict[str, Any]) -> None:
    """The library would panic."""
    write_gguf(tmp_path / "model.gguf", weights, tokens=demo_tokens() | {"merges": ["\u0120 a"]})

    with pytest.raises(CheckpointError, match=r"cannot be built: the merge 'Ġ a' needs 'Ġa', which is no token"):
        open_checkpoint(ModelOptions(str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("ids", [{}, {"tokenizer__ggml__eos_token_id": 10_000}])
def test_an_added_token_that_does_not_exist_is_refused(
    tmp_path: Path, weights: dict[str, Any], ids: dict[str, int]
) -> None:
    write_gguf(tmp_path / "model.gguf", weights, tokenizer__ggml__add_eos_token=True, **ids)

    with pytest.raises(CheckpointError, match=r"add_eos_token is true, but eos_token_id names none of the 282"):
        open_checkpoint(ModelOptions(str(tmp_path / "model.gguf")))


@pytest.mark.parametrize("ending", [{"add_eos_token": True, "eos_token_id": 256}, {"add_eos_token": False}])
def test_ace_steps_closing_token_is_there_once_whatever_the_flags_say(
    tmp_path: Path, weights: dict[str, Any], ending: dict[str, Any]
) -> None:
    """Its own tokenizer appends <|endoftext|>, those of many files with the same weights do not."""
    write_gguf(tmp_path / "model.gguf", weights, **{f"tokenizer__ggml__{key}": value for key, value in ending.items()})
    tokenizer = open_checkpoint(ModelOptions(str(tmp_path / "model.gguf"))).tokenizer
    [prompt] = tokenize(tokenizer, ["a cat"], get_preset("ace-step"))

    assert [index for index, token in enumerate(prompt.input_ids[::-1]) if token == 256] == [0, 2]  # the suffix has one


@pytest.mark.parametrize("pad", [256, 257])
def test_another_padding_token_is_a_warning(tmp_path: Path, weights: dict[str, Any], pad: int) -> None:
    """Files made from a fine-tuning tool's folder name its token."""
    write_gguf(tmp_path / "model.gguf", weights, tokens=demo_tokens() | {"pad": pad})
    warnings = open_checkpoint(ModelOptions(str(tmp_path / "model.gguf"))).warnings

    assert any("names the padding token '<|im_start|>'" in warning for warning in warnings) == (pad == 257)


def test_padding_rows_are_those_of_the_folder_whatever_token_the_file_names(
    tmp_path: Path, weights: dict[str, Any]
) -> None:
    """FLUX.2 klein shows hundreds of them to its transformer."""
    write_gguf(tmp_path / "model.gguf", weights, tokens=demo_tokens() | {"pad": 257})
    live = Preset(name="x", description="", source="", layers=(1,), padding="max_length", padding_rows="live")
    [found], [expected] = (
        TextEncoder.open(ModelOptions(str(tmp_path / name))).encode(["a cat"], live) for name in ("model.gguf", "plain")
    )

    np.testing.assert_array_equal(found.hidden_states, expected.hidden_states)


def train_tokenizer() -> tokenizers.Tokenizer:
    """Qwen2's pipeline, with merges learned from this file and the texts."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    split, to_bytes = pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text(), *TEXTS * 3], trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"architecture": "llama"}, "general.architecture is 'llama'", id="another-model"),
        pytest.param({"architecture": "clip"}, "holds the vision tower of a model and no model", id="projector"),
        pytest.param({"general__type": "imatrix"}, "holds statistics for quantizing a model", id="imatrix"),
        pytest.param({"split.count": 3}, "one of 3 parts, which its name does not say", id="split"),
        pytest.param({"qwen3__rope__scaling__type": "longrope"}, "'longrope'", id="other-rope"),
        pytest.param({"qwen3__rope__dimension_count": 32}, "dimension_count is 32", id="part-of-a-head"),
        pytest.param({"qwen3__rope__scaling__factor": "4"}, "scaling.factor is '4'", id="factor-string"),
        pytest.param(
            {"qwen3__rope__scaling__type": "yarn", "qwen3__rope__scaling__yarn_ext_factor": 0.5},
            "yarn_ext_factor is 0.5, expected 1",
            id="half-a-yarn",
        ),
    ],
)
def test_file_that_cannot_be_served_says_why(
    tmp_path: Path, weights: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """Before anything is loaded."""
    write_gguf(tmp_path / "model.gguf", weights, **options)

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ModelOptions(str(tmp_path / "model.gguf")))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*entries: bytes, tensors: int = 0, count: int | None = None, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries) if count is None else count) + b"".join(entries)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:7], id="cut-in-the-version"),
        pytest.param(lambda data: data[:1000], id="cut-in-the-keys"),
        pytest.param(lambda data: data[:-4000], id="cut-in-the-data"),
        pytest.param(lambda data: b"GGML" + data[4:], id="another-format"),
        pytest.param(lambda data: header(version=1), id="version-1"),
        pytest.param(lambda data: header(version=0x03000000), id="big-endian"),
        pytest.param(lambda data: header(count=2**60), id="absurd-number-of-keys"),
        pytest.param(lambda data: header(tensors=2**60), id="absurd-number-of-tensors"),
        pytest.param(lambda data: header(struct.pack("<Q", 2**62)), id="absurd-text"),
        pytest.param(lambda data: header(text("a") + struct.pack("<IIQ", 9, 8, 2**61)), id="absurd-array-of-texts"),
        pytest.param(lambda data: header(text("a") + struct.pack("<IIQ", 9, 0, 2**61)), id="absurd-array-of-bytes"),
        pytest.param(lambda data: header(text("a") + struct.pack("<IIQ", 9, 9, 1) * 1000), id="nested-arrays"),
        pytest.param(lambda data: header(text("a") + struct.pack("<I", 99)), id="unknown-type-of-value"),
        pytest.param(lambda data: header(*[text("a") + struct.pack("<IB", 0, 1)] * 2), id="one-key-twice"),
        pytest.param(lambda data: header(text("\xff").replace(b"\xc3\xbf", b"\xff\xff")), id="text-not-utf-8"),
        pytest.param(lambda data: header(tensors=1) + tensor("a", [4] * 9) + bytes(999), id="absurd-rank"),
        pytest.param(lambda data: header(tensors=1) + tensor("a", [2**62, 2**62]) + bytes(999), id="dims-overflow"),
        pytest.param(lambda data: header(tensors=1) + tensor("a", [4], 77) + bytes(999), id="unknown-type-of-tensor"),
        pytest.param(lambda data: header(tensors=1) + tensor("a", [33], 8) + bytes(999), id="broken-block"),
        pytest.param(lambda data: header(tensors=1) + tensor("a", [4], 0, 2**63) + bytes(999), id="offset-outside"),
        pytest.param(lambda data: header(tensors=2) + (tensor("a", [4]) + tensor("b", [4])) + bytes(999), id="overlap"),
        pytest.param(
            lambda data: header(tensors=2) + (tensor("b", [4], offset=15) + tensor("a", [4])) + bytes(999),
            id="overlap-by-a-byte",
        ),
    ],
)
def test_damaged_file_is_named_at_once(
    tmp_path: Path, weights: dict[str, Any], damage: Callable[[bytes], bytes]
) -> None:
    """Within a second and without memory for what it claims to hold."""
    file = tmp_path / "model.gguf"
    write_gguf(file, weights)
    file.write_bytes(damage(file.read_bytes()))
    started = time.process_time()

    with pytest.raises(CheckpointError, match=r"model.gguf: (cannot be read as GGUF|is empty)"):
        open_checkpoint(ModelOptions(str(file)))
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("first", "message"),
    [
        pytest.param(tensor("token_embd.weight", [256, 0], 12), "expected floats, or a matrix", id="no-rows"),
        pytest.param(tensor("token_embd.weight", [256], 12), "expected floats, or a matrix", id="a-quantized-vector"),
        pytest.param(tensor("token_embd.weight", []), "has no matrix token_embd.weight", id="a-number"),
        pytest.param(tensor("token_embd.weight", [4]), "has no matrix token_embd.weight", id="a-vector"),
        pytest.param(tensor("output_norm.weight", [4]), "has no matrix token_embd.weight", id="none"),
    ],
)
def test_embedding_of_an_absurd_shape_is_named(tmp_path: Path, first: bytes, message: str) -> None:
    """The header itself is sound."""
    (tmp_path / "model.gguf").write_bytes(header(tensors=1) + first + bytes(999))

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ModelOptions(str(tmp_path / "model.gguf")))


def test_file_that_vanishes_before_it_is_read_is_named(tmp_path: Path, weights: dict[str, Any]) -> None:
    """Tensors are read later than headers."""
    write_gguf(tmp_path / "model.gguf", weights)
    options = ModelOptions(str(tmp_path / "model.gguf"))
    checkpoint = open_checkpoint(options)
    (tmp_path / "model.gguf").unlink()

    with pytest.raises(CheckpointError, match=r"model.gguf: .* cannot be read"):
        TextEncoder(checkpoint, options)


@pytest.fixture
def parts(tmp_path: Path, weights: dict[str, Any]) -> list[Path]:
    """The files of a model that has been split, and beside them a part of another."""
    folder = tmp_path / "a model, split"
    folder.mkdir()
    write_gguf(folder / "model.gguf", weights, part_tensors=9)
    (folder / "other-00001-of-00003.gguf").write_bytes(b"GGUF")
    return sorted(folder.glob("model-*.gguf"))


@pytest.mark.parametrize("number", [0, 2])
def test_any_part_of_a_split_model_opens_it_whole(tmp_path: Path, parts: list[Path], number: int) -> None:
    assert [part.name for part in parts] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]

    for found, expected in zip(encode(parts[number]), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_array_equal(found, expected)
    plain = open_checkpoint(ModelOptions(str(tmp_path / "plain")))
    assert open_checkpoint(ModelOptions(str(parts[number]))).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda parts: parts[1].unlink(), r"model-00002-of-00003.gguf are missing", id="missing"),
        pytest.param(lambda parts: parts[1].write_bytes(parts[2].read_bytes()), r"split.no", id="another-in-its-place"),
        pytest.param(lambda parts: parts[2].write_bytes(b"GGUF"), r"00003-of-00003.gguf: cannot be read", id="damaged"),
        pytest.param(lambda parts: parts[0].rename(parts[0].with_name("a.gguf")), r"missing", id="renamed"),
    ],
)
def test_parts_that_do_not_make_a_model_are_named(
    parts: list[Path], damage: Callable[[list[Path]], object], message: str
) -> None:
    damage(parts)

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(ModelOptions(str(parts[2])))


def test_folder_of_gguf_files_asks_for_one_of_them(parts: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"several GGUF.*: model-00001-of-00003.gguf, other-00001-of-00003.gguf"):
        open_checkpoint(ModelOptions(str(parts[0].parent)))


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        pytest.param({"scaling.factor": 2.5}, {"type": "linear", "factor": 2.5}, id="factor-without-a-type-is-linear"),
        pytest.param({"scaling.type": "linear", "scaling.factor": 4.0}, {"type": "linear", "factor": 4.0}, id="linear"),
        pytest.param({"scale_linear": 4.0}, {"type": "linear", "factor": 4.0}, id="old-key"),
        pytest.param({"scaling.type": "none", "scaling.factor": 4.0}, None, id="type-none"),
        pytest.param({"scaling.factor": 0.0}, None, id="factor-zero"),
        pytest.param({"scaling.factor": 1.0}, None, id="factor-one"),
        pytest.param({"dimension_count": 64}, None, id="whole-heads"),
        pytest.param(
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 512},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            id="yarn",
        ),
        pytest.param(
            {"scaling.type": "yarn", "scaling.factor": 4.0, "context_length": 512},
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            id="yarn-of-the-context",
        ),
        pytest.param(
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 512,
                "scaling.yarn_attn_factor": 1.25,
                "scaling.yarn_beta_fast": 20.0,
                "scaling.yarn_beta_slow": 2.0,
            },
            {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 512,
                "attention_factor": 1.25,
                "beta_fast": 20,
                "beta_slow": 2,
            },
            id="yarn-in-full",
        ),
        pytest.param(
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 2.0},
            {"type": "yarn", "factor": 4.0, "attention_factor": 2 * (0.1 * math.log(4) + 1)},
            id="attn-factor-multiplies",
        ),
        pytest.param(
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_log_multiplier": 0.5},
            {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            id="log-multiplier",
        ),
    ],
)
def test_scaled_rope_is_that_of_the_same_config(
    tmp_path: Path, weights: dict[str, Any], rope: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    """llama.cpp takes a factor without a type for linear; ignored, the hidden states would be another model's."""
    metadata = {f"qwen3.rope.{key}".replace(".", "__"): value for key, value in rope.items()}
    write_gguf(tmp_path / "model.gguf", weights, **metadata)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config |= {"rope_theta": 1e6, "rope_parameters": None, "rope_scaling": scaling, "max_position_embeddings": 4096}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))

    for ours, expected in zip(encode(tmp_path / "model.gguf"), encode(tmp_path / "plain"), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_factors_on_the_frequencies_are_refused_unless_they_are_one(tmp_path: Path, weights: dict[str, Any]) -> None:
    """llama.cpp divides the frequencies by `rope_freqs.weight`, whatever the metadata say."""
    ones, others = np.ones(32, np.float32), np.linspace(1, 8, 32, dtype=np.float32)
    write_gguf(tmp_path / "ones.gguf", weights, extra={"rope_freqs.weight": ones})
    write_gguf(tmp_path / "others.gguf", weights, extra={"rope_freqs.weight": others})

    assert encode(tmp_path / "ones.gguf")
    with pytest.raises(CheckpointError, match=r"others.gguf: rope_freqs.weight changes RoPE's frequencies"):
        encode(tmp_path / "others.gguf")


def test_folder_of_one_gguf_model_is_opened(tmp_path: Path, parts: list[Path]) -> None:
    """As LM Studio keeps it, perhaps beside the file of its vision tower."""
    for part in parts:
        shutil.copy(part, tmp_path / part.name)
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    (tmp_path / "._model.gguf").write_bytes(b"junk")

    assert open_checkpoint(ModelOptions(str(tmp_path))).weights.tensors["norm.weight"].file.parent == tmp_path


def test_hugging_faces_names_are_read(tmp_path: Path, weights: dict[str, Any]) -> None:
    """ComfyUI's tools keep the keys of the safetensors file that they are given, and an architecture of their own."""
    for architecture, names in (("qwen3", None), ("cow", "model.")):
        write_gguf(tmp_path / f"{architecture}.gguf", weights, architecture=architecture, prefix=names)
    named, plain = (open_checkpoint(ModelOptions(str(tmp_path / f"{name}.gguf"))) for name in ("cow", "qwen3"))

    assert named.fingerprint == plain.fingerprint
