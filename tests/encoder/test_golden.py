"""Against hidden states that transformers computed; tests/golden/make_golden.py made them, and needs PyTorch."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open

from encoder import PromptEmbeds, TextEncoder
from encoder.options import ModelOptions
from encoder.types import Job, Tap
from tests.reference import hidden_states, relative_error

GOLDEN = Path(__file__).parents[1] / "golden"

# Both sides round in float32, over up to 28 layers: up to 2e-5 here. A wrong formula is off by 1e-3 and more.
CLOSE = 5e-5


class Golden:
    """One folder of tests/golden: a checkpoint and what transformers made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "expected.safetensors", framework="numpy") as file:
            self.input_ids = file.get_tensor("input_ids")  # (B, L)
            self.num_tokens = file.get_tensor("num_tokens")  # (B,)
            self.hidden_states = file.get_tensor("hidden_states")  # (n, B, L, D)
            self.indices: list[int] = json.loads(file.metadata()["indices"])


@pytest.fixture(scope="module", params=["small", "deep"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(GOLDEN / request.param)


@pytest.fixture(scope="module")
def text_encoder(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("golden")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden.folder / name, folder)
    # The ids are given, so the tokenizer need only exist and name the padding token that make_golden.py used.
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    return TextEncoder.open(ModelOptions(str(folder), compute_dtype="float32"))


def jobs(golden: Golden, rows: int | None) -> list[Job]:
    """The golden's prompts and hidden states as jobs; `rows` is how many are computed, or None for the real ones."""
    depth = golden.config["num_hidden_layers"]
    prompts = [tuple(ids[:n].tolist()) for ids, n in zip(golden.input_ids, golden.num_tokens, strict=True)]
    return [
        Job(
            input_ids=input_ids,
            computed_rows=rows or len(input_ids),
            delivered_rows=rows or len(input_ids),
            dropped_rows=0,
            taps=tuple(Tap(index, normed=index == depth) for index in golden.indices),
            combine="stack",
            dtype="float32",
        )
        for input_ids in prompts
    ]


def test_hidden_states_equal_transformers_padding_rows_included(golden: Golden, text_encoder: TextEncoder) -> None:
    """FLUX.2 klein is given padding rows too, so they must be those that it was trained with."""
    results = text_encoder.run(jobs(golden, rows=golden.input_ids.shape[1]))

    for row, result in enumerate(results):
        assert isinstance(result, PromptEmbeds)
        assert relative_error(result.hidden_states, golden.hidden_states[:, row]) < CLOSE


def test_real_rows_equal_transformers_without_padding(golden: Golden, text_encoder: TextEncoder) -> None:
    """What is not delivered is not computed, and must not have mattered."""
    results = text_encoder.run(jobs(golden, rows=None))

    for row, (result, num_tokens) in enumerate(zip(results, golden.num_tokens, strict=True)):
        assert isinstance(result, PromptEmbeds)
        assert relative_error(result.hidden_states, golden.hidden_states[:, row, :num_tokens]) < CLOSE


def test_reference_equals_transformers(golden: Golden) -> None:
    """The reference that other tests compare with is itself right."""
    config = golden.config | golden.config["rope_parameters"]
    arrays = mx.load(str(golden.folder / "model.safetensors"))
    assert isinstance(arrays, dict)
    weights = {key.removeprefix("model."): np.array(array.astype(mx.float32)) for key, array in arrays.items()}

    for row, (input_ids, num_tokens) in enumerate(zip(golden.input_ids, golden.num_tokens, strict=True)):
        states = hidden_states(config, weights, input_ids.tolist(), num_tokens=int(num_tokens))
        expected = golden.hidden_states[:, row]
        assert relative_error(np.stack([states[index] for index in golden.indices]), expected) < CLOSE


def test_config_is_read_where_transformers_5_writes_it(golden: Golden, text_encoder: TextEncoder) -> None:
    """It writes rope_theta into rope_parameters alone, and head_dim need not be hidden_size / num_attention_heads."""
    config = text_encoder.config

    assert "rope_theta" not in golden.config
    assert config.rope_theta == golden.config["rope_parameters"]["rope_theta"]
    assert config.head_dim == golden.config["head_dim"] != config.hidden_size // config.num_attention_heads
