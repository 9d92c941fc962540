"""Token ids against AutoTokenizer, on folders whose tokens are declared in every way that files of Qwen3 have."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, pre_tokenizers, trainers

from encoder.checkpoint.files.demo_tokenizer import tokenizer_config, tokenizer_json
from encoder.checkpoint.files.qwen2_tokenizer import qwen2_tokenizer
from encoder.checkpoint.files.tokenizer_files import open_tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

pytestmark = pytest.mark.parity

QWEN3_TOKENS = [token["content"] for token in tokenizer_json()["added_tokens"]]

WORDS = 320  # of the vocabulary, before the added tokens
FIRST_FREE = WORDS + len(QWEN3_TOKENS)
NEW = ["<|new_0|>", "<|new_1|>", "<loc>", "ünï", "[PAD]", "<im_patch>", "cat", "<|endoftext|>", "<|im_end|>", "<think>"]
TEXTS = [
    "",
    " ",
    "a cat",
    "cat",
    "a  cat cats concat",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "\n\n leading and trailing \n\t",
    "雪中的红狐狸cafe\u0301 u\u0308nï ünï",
    "👩‍👩‍👧 🦊",
    "don't WE'LL 12345 x=3.14;\r\n",
    *(f"a {token} b{token}c  {token}  {token}{token}" for token in NEW),
    " ".join(NEW),
    "".join(NEW),
    "<|image_pad|><|vision_pad|><|PAD_TOKEN|><tool_call>",
]


def added(text: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    return {"content": text, **plain, **flags}


def decoder(*tokens: dict[str, Any], first: int = FIRST_FREE) -> dict[str, Any]:
    return {str(first + number): token for number, token in enumerate(tokens)}


def typed(text: str, **flags: bool) -> dict[str, Any]:
    """As transformers has written a token with flags."""
    return {"__type": "AddedToken", **added(text, **flags)}


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
BACKEND = {"tokenizer_class": "TokenizersBackend"}

# Each folder: what replaces the fields of tokenizer_config.json (None: the whole file), and other files. Tokens under
# KEEP are added to those that it declares.
KEEP = "KEEP"
FOLDERS: dict[str, Any] = {
    "as-published": ({},),
    "no-class": ({"tokenizer_class": None},),
    "no-config": (None,),
    "config-of-qwen3-alone": (None, {"config.json": {"model_type": "qwen3"}}),
    "empty-config-of-qwen3-vl": (None, {"config.json": {"model_type": "qwen3_vl"}, "tokenizer_config.json": {}}),
    "decoder": ({KEEP: decoder(added("<|new_0|>", special=True), added("<loc>", normalized=True))},),
    "decoder-with-flags": (
        {
            KEEP: decoder(
                added("<loc>", lstrip=True),
                added("<|new_0|>", rstrip=True, special=True),
                added("cat", single_word=True),
                added("ünï", normalized=True),
            )
        },
    ),
    "decoder-with-a-gap": ({KEEP: decoder(added("<|new_0|>"), first=FIRST_FREE + 11)},),
    "decoder-lacks-tokens-of-tokenizer-json": ({"added_tokens_decoder": decoder(added("<|new_0|>"))},),
    "decoder-of-no-token": ({"added_tokens_decoder": {}},),
    "decoder-renames-flags-of-the-end": (
        {"added_tokens_decoder": decoder(added("<|im_end|>", lstrip=True), first=WORDS + 2)},
    ),
    "additional": ({"additional_special_tokens": ["<|im_start|>", "<|new_1|>", "<loc>"]},),
    "additional-with-flags": ({"additional_special_tokens": [typed("<loc>", lstrip=True), "<|new_0|>"]},),
    "extra-list": ({"additional_special_tokens": None, "extra_special_tokens": ["<|new_1|>", "<|new_0|>"]},),
    "extra-list-and-additional": ({"extra_special_tokens": ["<|new_1|>"], "additional_special_tokens": ["<loc>"]},),
    "extra-empty-list-and-additional": ({"extra_special_tokens": [], "additional_special_tokens": ["<loc>"]},),
    "extra-dict": ({"extra_special_tokens": {"loc_token": "<loc>", "new": "<|new_0|>"}},),
    "extra-dict-with-flags": ({"extra_special_tokens": {"loc_token": typed("<loc>", rstrip=True)}},),
    "own-names": ({"image_token": "<|image_pad|>", "patch_token": "<im_patch>", "loc_token": "<loc>"},),
    "model-specific": ({"model_specific_special_tokens": {"loc_token": "<loc>"}},),
    "model-specific-and-own-name": (
        {"model_specific_special_tokens": {"loc_token": "<loc>"}, "patch_token": "<im_patch>"},
    ),
    "unknown-pad": ({"pad_token": "[PAD]"},),
    "unknown-pad-with-flags": ({"pad_token": typed("[PAD]", lstrip=True)},),
    "unknown-names-share-a-token": ({"pad_token": "[PAD]", "unk_token": "[PAD]", "bos_token": "<|new_0|>"},),
    "a-word-is-the-end": ({"eos_token": "cat"},),
    "a-word-is-the-end-with-flags": ({"eos_token": typed("cat", single_word=True, normalized=True)},),
    "names-missing": ({"eos_token": None, "pad_token": None, "unk_token": None},),
    "names-null": ({"eos_token": "null", "pad_token": "null", "unk_token": "null"},),
    "flags-add-tokens": ({"add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_start|>"},),
    "prefix-space": ({"add_prefix_space": True},),
    "split-special": ({"split_special_tokens": True},),
    "fast-class-with-decoder": ({**FAST, KEEP: decoder(added("<|new_0|>"), added("<loc>", lstrip=True))},),
    "fast-class-decoder-lacks-tokens": ({**FAST, "added_tokens_decoder": decoder(added("<|new_0|>"))},),
    "fast-class-additional": ({**FAST, "additional_special_tokens": ["<|new_0|>", "<loc>"]},),
    "fast-class-prefix-space": ({**FAST, "add_prefix_space": True},),
    "backend-class-extra": ({**BACKEND, "extra_special_tokens": ["<loc>"], "pad_token": "[PAD]"},),
    "unknown-class": ({"tokenizer_class": "Qwen3Tokenizer", "extra_special_tokens": ["<loc>"]},),
    "llama-class": ({"tokenizer_class": "LlamaTokenizerFast", "pad_token": "[PAD]"},),
    "fast-suffix": ({"tokenizer_class": "Qwen2TokenizerFast", "extra_special_tokens": ["<loc>"]},),
    "added-tokens-json": (
        {"added_tokens_decoder": None},
        {"added_tokens.json": {"<loc>": FIRST_FREE + 1, "<|new_0|>": FIRST_FREE, "ünï": FIRST_FREE + 2}},
    ),
    "added-tokens-json-beside-the-decoder": ({}, {"added_tokens.json": {"<loc>": FIRST_FREE}}),
    "added-tokens-json-special": (
        {"added_tokens_decoder": None, "additional_special_tokens": ["<|new_0|>"]},
        {"added_tokens.json": {"<|new_0|>": FIRST_FREE, "<loc>": FIRST_FREE + 1}},
    ),
    "special-map": (
        {"added_tokens_decoder": None, "additional_special_tokens": None},
        {
            "special_tokens_map.json": {
                "additional_special_tokens": ["<|im_start|>", "<loc>"],
                "eos_token": added("<|new_0|>", lstrip=True) | {"special": False},
                "pad_token": "[PAD]",
            }
        },
    ),
    "special-map-extra": (
        {"added_tokens_decoder": None, "extra_special_tokens": ["<loc>"]},
        {"special_tokens_map.json": {"extra_special_tokens": ["<|new_0|>", "<loc>"], "image_token": "<im_patch>"}},
    ),
    "special-map-extra-dict": (
        {"added_tokens_decoder": None, "additional_special_tokens": None},
        {"special_tokens_map.json": {"extra_special_tokens": {"loc_token": "<loc>"}}},
    ),
    "special-map-beside-the-decoder": ({}, {"special_tokens_map.json": {"pad_token": "[PAD]"}}),
    "no-config-but-older-files": (
        None,
        {"added_tokens.json": {"<loc>": FIRST_FREE}, "special_tokens_map.json": {"pad_token": "[PAD]"}},
    ),
}
JSON_FOLDERS: dict[str, Any] = {  # what replaces parts of tokenizer.json, and fields of tokenizer_config.json
    "appends-a-token": ({"post_processor": "APPEND"}, {}),
    "appends-a-token-with-the-fast-class": ({"post_processor": "APPEND"}, FAST),
    "no-post-processor": ({"post_processor": None}, {}),
    "other-normalizer": ({"normalizer": None}, {}),
    "other-normalizer-with-the-fast-class": ({"normalizer": None}, FAST),
    "token-in-tokenizer-json-alone": ({"added_tokens": [added("<loc>", lstrip=True) | {"id": FIRST_FREE}]}, {}),
    "token-in-tokenizer-json-without-decoder": (
        {"added_tokens": [added("<loc>", lstrip=True) | {"id": FIRST_FREE}]},
        {"added_tokens_decoder": None},
    ),
    "padding-and-truncation": (
        {
            "padding": {
                "strategy": "BatchLongest",
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "[PAD]",
            }
        },
        {**FAST, "pad_token": None},
    ),
}


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer like Qwen3's, of few words, and its tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("small")
    trained = qwen2_tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=WORDS, show_progress=False, initial_alphabet=alphabet)
    )
    trained.add_tokens(
        [
            AddedToken(token["content"], normalized=False, special=token["special"])
            for token in tokenizer_json()["added_tokens"]
        ]
    )
    assert (trained.get_vocab_size(False), trained.get_vocab_size()) == (WORDS, FIRST_FREE)
    trained.save(str(folder / "tokenizer.json"))
    settings = tokenizer_config()
    declared = settings["added_tokens_decoder"].values()
    settings["added_tokens_decoder"] = {str(WORDS + number): token for number, token in enumerate(declared)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write(folder: Path, source: Path, fields: Mapping[str, Any] | None, files: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "tokenizer.json", folder)
    published = json.loads((source / "tokenizer_config.json").read_text())
    if fields is not None:
        merged = published | {key: value for key, value in fields.items() if key != KEEP}
        if KEEP in fields:
            merged["added_tokens_decoder"] = published["added_tokens_decoder"] | fields[KEEP]
        merged = {key: None if value == "null" else value for key, value in merged.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(merged))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def assert_equal(folder: Path) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = open_tokenizer(folder)

    for text in TEXTS:
        for special in (True, False):
            expected = reference(text, add_special_tokens=special).input_ids
            assert list(tokenizer.tokenize(text, max_length=10**6, add_special_tokens=special)[0]) == expected, text
    assert tokenizer.vocab_size == max(reference.get_vocab().values()) + 1
    assert tokenizer.pad_token == reference.pad_token


@pytest.mark.parametrize("name", FOLDERS)
def test_declared_tokens_are_those_of_transformers(tmp_path: Path, small_tokenizer: Path, name: str) -> None:
    fields, *files = FOLDERS[name]
    assert_equal(write(tmp_path, small_tokenizer, fields, files[0] if files else {}))


@pytest.mark.parametrize("name", JSON_FOLDERS)
def test_parts_of_tokenizer_json_count_as_in_transformers(tmp_path: Path, small_tokenizer: Path, name: str) -> None:
    parts, fields = JSON_FOLDERS[name]
    folder = write(tmp_path, small_tokenizer, fields, {})
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["added_tokens"] += parts.get("added_tokens", [])
    stored |= {key: value for key, value in parts.items() if key != "added_tokens"}
    if parts.get("post_processor") == "APPEND":
        end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        single = [{"Sequence": {"id": "A", "type_id": 0}}, end]
        known = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [WORDS], "tokens": ["<|endoftext|>"]}}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}, end]
        stored["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": known,
        }
    (folder / "tokenizer.json").write_text(json.dumps(stored))

    assert_equal(folder)


SLOW: dict[str, Any] = {
    "as-published": ({}, {}),
    "with-new-tokens": ({KEEP: decoder(added("<|new_0|>", special=True), added("<loc>", lstrip=True))}, {}),
    "adds-an-end": ({"add_eos_token": True}, {}),
    "adds-both": ({"add_eos_token": True, "add_bos_token": True, "bos_token": "<|im_start|>"}, {}),
    "adds-what-it-does-not-name": ({"add_bos_token": True, "add_eos_token": True, "eos_token": "null"}, {}),
    "prefix-space": ({"add_prefix_space": True}, {}),
    "older": (
        {"added_tokens_decoder": None},
        {
            "added_tokens.json": {"<|endoftext|>": WORDS, "<|im_start|>": WORDS + 1, "<|im_end|>": WORDS + 2},
            "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|endoftext|>"},
        },
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_tokenizers_files_give_the_ids_of_transformers(tmp_path: Path, small_tokenizer: Path, name: str) -> None:
    fields, files = SLOW[name]
    folder = write(tmp_path, small_tokenizer, fields, files)
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")

    assert_equal(folder)


def test_qwen3s_own_tokenizer_gives_the_ids_of_transformers(qwen3_tokenizer: Path) -> None:
    assert_equal(qwen3_tokenizer)
