"""The tokens of the latest requests: kept for short ones, and never those of another preset or prompt."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from encoder.options import ModelOptions
from encoder.presets.built_in import LAST_HIDDEN_STATE, get_preset
from encoder.presets.preset import Preset
from encoder.serving import recent_tokens as recent
from encoder.serving.engine import Engine
from encoder.serving.recent_tokens import RecentTokens
from encoder.text_encoder import TextEncoder
from encoder.types import TokenizedPrompt

Z_IMAGE = get_preset("z-image")
TOKENS = [TokenizedPrompt("a cat", (1, 2), truncated=False)]


def test_what_was_put_is_found_again_under_the_same_prompts_and_preset() -> None:
    tokens = RecentTokens()
    tokens.put(["a cat"], Z_IMAGE, TOKENS)
    assert tokens.get(["a cat"], Z_IMAGE) is TOKENS
    assert tokens.get(("a cat",), replace(Z_IMAGE)) is TOKENS  # equal is enough


@pytest.mark.parametrize(
    ("prompts", "preset"),
    [
        pytest.param(["a dog"], Z_IMAGE, id="prompt"),
        pytest.param(["a cat", ""], Z_IMAGE, id="prompts"),
        pytest.param(["a cat"], LAST_HIDDEN_STATE, id="preset"),
        pytest.param(["a cat"], replace(Z_IMAGE, max_sequence_length=9), id="window"),
        pytest.param(["a cat"], replace(Z_IMAGE, suffix="!"), id="template"),
    ],
)
def test_nothing_is_found_under(prompts: list[str], preset: Preset) -> None:
    tokens = RecentTokens()
    tokens.put(["a cat"], Z_IMAGE, TOKENS)
    assert tokens.get(prompts, preset) is None


def test_the_request_that_was_asked_for_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "MAX_REQUESTS", 2)
    tokens = RecentTokens()
    for prompt in ("a", "b"):
        tokens.put([prompt], Z_IMAGE, TOKENS)
    tokens.get(["a"], Z_IMAGE)
    tokens.put(["c"], Z_IMAGE, TOKENS)
    assert len(tokens) == 2
    assert tokens.get(["b"], Z_IMAGE) is None
    assert tokens.get(["a"], Z_IMAGE) is TOKENS


@pytest.mark.parametrize(
    "tokenized",
    [
        pytest.param([TokenizedPrompt("x" * 2**16, (1,), truncated=True)], id="text, most of which was cut"),
        pytest.param([TokenizedPrompt("x", (1,) * 2000, truncated=False)], id="tokens"),
        pytest.param([TokenizedPrompt("x" * 300, (1,) * 300, truncated=False)] * 6, id="prompts with a long template"),
    ],
)
def test_a_long_request_is_not_kept(tokenized: list[TokenizedPrompt]) -> None:
    tokens = RecentTokens()
    tokens.put(["x"] * len(tokenized), Z_IMAGE, tokenized)
    assert len(tokens) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_request_that_comes_again_is_tokenized_once(
    model: ModelOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[tuple[Sequence[str], Preset]] = []
    tokenize = TextEncoder.tokenize

    def counted(self: TextEncoder, prompts: Sequence[str], preset: Preset) -> list[TokenizedPrompt]:
        tokenized.append((tuple(prompts), preset))
        return tokenize(self, prompts, preset)

    engine = Engine(model)
    await engine.start()
    monkeypatch.setattr(TextEncoder, "tokenize", counted)
    try:
        first = await engine.encode(["a cat"], LAST_HIDDEN_STATE)
        again = await engine.encode(["a cat"], LAST_HIDDEN_STATE, cache_policy="bypass")
        other = replace(LAST_HIDDEN_STATE, max_sequence_length=3)
        shorter = await engine.encode(["a cat"], other)
    finally:
        await engine.close()
    assert tokenized == [(("a cat",), LAST_HIDDEN_STATE), (("a cat",), other)]
    assert again.prompts == first.prompts
    assert len(shorter.prompts[0].input_ids) == 3
