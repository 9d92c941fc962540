"""Every hidden state against transformers itself, on checkpoints that transformers saved."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import PromptEmbeds, TextEncoder
from encoder.types import Job, Tap
from tests.checkpoints import write_tokenizer
from tests.reference import relative_error

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

pytestmark = pytest.mark.parity

# Both sides round in float32, in another order. Up to 2e-6 for short prompts; RoPE's angles, which grow with the position
# and are rounded at 6e-8 of it, add up to 3e-5 in a window of 512. A wrong formula is off by 1e-3 and more.
CLOSE = 1e-4

TEXT: dict[str, Any] = {
    "hidden_size": 40,  # hidden_size / num_attention_heads is not head_dim
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


def qwen3(model: str, **text: Any) -> Any:
    return getattr(transformers, model)(transformers.Qwen3Config(**(TEXT | text)))


def qwen3_vl(model: str, **text: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = TEXT | {"rope_parameters": rope} | text
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False)
    return getattr(transformers, model)(config.text_config if model == "Qwen3VLTextModel" else config)


def randomize(model: Any) -> None:
    """Weights that leave nothing neutral: fresh norms are ones, and fresh matrices so small that layers hardly matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0)
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize(
    ("build", "save", "window"),
    [
        pytest.param(lambda: qwen3("Qwen3ForCausalLM"), {}, 24, id="Qwen3ForCausalLM"),
        pytest.param(lambda: qwen3("Qwen3ForCausalLM", tie_word_embeddings=True), {}, 24, id="tied"),
        pytest.param(lambda: qwen3("Qwen3Model"), {}, 24, id="Qwen3Model"),
        pytest.param(lambda: qwen3_vl("Qwen3VLForConditionalGeneration"), {}, 24, id="Qwen3VLForConditionalGeneration"),
        pytest.param(lambda: qwen3_vl("Qwen3VLModel"), {}, 24, id="Qwen3VLModel"),
        pytest.param(lambda: qwen3_vl("Qwen3VLTextModel"), {}, 24, id="Qwen3VLTextModel"),
        pytest.param(lambda: qwen3("Qwen3ForCausalLM"), {"max_shard_size": "40KB"}, 24, id="sharded"),
        pytest.param(
            lambda: qwen3_vl("Qwen3VLForConditionalGeneration"), {"max_shard_size": "40KB"}, 24, id="sharded-Qwen3-VL"
        ),
        pytest.param(lambda: qwen3("Qwen3ForCausalLM").bfloat16(), {}, 24, id="bfloat16"),
        pytest.param(lambda: qwen3_vl("Qwen3VLModel").bfloat16(), {}, 24, id="bfloat16-Qwen3-VL"),
        pytest.param(lambda: qwen3("Qwen3Model", num_attention_heads=8, num_key_value_heads=1), {}, 24, id="one-kv-head"),
        pytest.param(
            lambda: qwen3("Qwen3Model", num_attention_heads=4, num_key_value_heads=4), {}, 24, id="a-kv-head-each"
        ),
        pytest.param(lambda: qwen3("Qwen3Model", attention_bias=True), {}, 24, id="attention-bias"),
        pytest.param(lambda: qwen3("Qwen3Model", rms_norm_eps=1e-3), {}, 24, id="large-eps"),
        pytest.param(lambda: qwen3("Qwen3Model", num_hidden_layers=36), {}, 24, id="36-layers"),
        pytest.param(lambda: qwen3("Qwen3Model", head_dim=128), {}, 512, id="whole-window-at-the-real-head-dim"),
    ],
)
def test_every_hidden_state_equals_transformers(
    tmp_path: Path, build: Callable[[], Any], save: dict[str, Any], window: int
) -> None:
    """Real rows and padding rows, in float32, whatever class was saved and however it was stored."""
    model = build()
    randomize(model)
    model.save_pretrained(tmp_path, **save)
    write_tokenizer(tmp_path)
    text_encoder = TextEncoder.open(str(tmp_path), compute_dtype="float32")
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = random_prompts([window, window // 2 + 1, 7, 1])
    theirs = their_hidden_states(model, prompts, window, text_encoder.checkpoint.tokenizer.pad_token_id)
    ours = our_hidden_states(text_encoder, prompts, window)

    for k, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(our, their) < CLOSE, f"hidden state {k}"


def random_prompts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(256, size=length).tolist()) for length in lengths]


def their_hidden_states(model: Any, prompts: Sequence[Sequence[int]], window: int, pad_token_id: int) -> Any:
    """(N+1, B, L, D), from input_ids padded on the right and an attention_mask."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.tensor([[*prompt, *[pad_token_id] * (window - len(prompt))] for prompt in prompts])
    attention_mask = (torch.arange(window) < lengths[:, None]).long()
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    return torch.stack(output.hidden_states).numpy()


def our_hidden_states(text_encoder: TextEncoder, prompts: Sequence[tuple[int, ...]], window: int) -> Any:
    """The same as jobs of one batch that want everything."""
    depth = text_encoder.config.num_hidden_layers
    taps = tuple(Tap(k, normed=k == depth) for k in range(depth + 1))
    jobs = [Job(prompt, window, window, 0, taps, "stack", "float32") for prompt in prompts]
    results = text_encoder.run(jobs)
    return np.stack([result.hidden_states for result in results if isinstance(result, PromptEmbeds)], axis=1)
