"""Every hidden state against transformers itself, on checkpoints that transformers saved."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from encoder import PromptEmbeds, TextEncoder
from encoder.options import ModelOptions
from encoder.qwen3.model import apply_rope
from encoder.qwen3.rope import Rope
from encoder.types import Job, Tap
from tests.checkpoints import write_tokenizer
from tests.parity.random_weights import randomize
from tests.reference import relative_error

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

modeling_qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")

pytestmark = pytest.mark.parity

# Both sides round in float32, in another order: up to 1e-5 in short prompts, 5e-5 in a window of 512 and 28 layers. A
# wrong formula is off by 1e-3 and more.
CLOSE = 1e-4
PAD_TOKEN_ID = 256

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
        pytest.param(
            lambda: qwen3("Qwen3Model", num_attention_heads=8, num_key_value_heads=1), {}, 24, id="one-kv-head"
        ),
        pytest.param(
            lambda: qwen3("Qwen3Model", num_attention_heads=4, num_key_value_heads=4), {}, 24, id="a-kv-head-each"
        ),
        pytest.param(lambda: qwen3("Qwen3Model", attention_bias=True), {}, 24, id="attention-bias"),
        pytest.param(lambda: qwen3("Qwen3Model", rms_norm_eps=1e-3), {}, 24, id="large-eps"),
        pytest.param(lambda: qwen3("Qwen3Model", num_hidden_layers=36), {}, 24, id="36-layers"),
        pytest.param(
            lambda: qwen3("Qwen3Model", head_dim=128, num_hidden_layers=28), {}, 512, id="whole-window-of-flux2-klein"
        ),
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
    text_encoder = TextEncoder.open(ModelOptions(str(tmp_path), compute_dtype="float32"))
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = random_prompts([window, window // 2 + 1, 7, 1])
    theirs = their_hidden_states(model, prompts, window, PAD_TOKEN_ID)
    ours = our_hidden_states(text_encoder, prompts, window)

    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(save)
    for k, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(our, their) < CLOSE, f"hidden state {k}"


def test_long_prompts_equal_transformers(tmp_path: Path) -> None:
    """RoPE's angles grow with the position, and so does whatever is wrong with them."""
    model = qwen3("Qwen3Model", head_dim=128)
    randomize(model)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    text_encoder = TextEncoder.open(ModelOptions(str(tmp_path), compute_dtype="float32"))
    prompts = random_prompts([2048])
    theirs = their_hidden_states(model.eval(), prompts, 2048, PAD_TOKEN_ID)
    ours = our_hidden_states(text_encoder, prompts, 2048)

    # Frequencies rounded as PyTorch's leave 1e-5 after four layers; off in the last bit, they leave 7e-5.
    assert relative_error(ours, theirs) < 3e-5


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 64}
MROPE = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}


@pytest.mark.parametrize(
    ("build", "rope"),
    [
        pytest.param(qwen3, {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5}, id="linear"),
        pytest.param(qwen3, YARN | {"factor": 4.0}, id="yarn"),
        pytest.param(qwen3, YARN | {"factor": 1.5}, id="yarn-of-another-factor"),
        pytest.param(qwen3, YARN | {"factor": 4.0, "attention_factor": 1.3}, id="attention-factor"),
        pytest.param(qwen3, YARN | {"factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}, id="betas"),
        pytest.param(qwen3, YARN | {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2}, id="mscale"),
        pytest.param(qwen3_vl, MROPE | YARN | {"factor": 4.0, "rope_theta": 5e6}, id="yarn-of-qwen3-vl"),
    ],
)
def test_scaled_rope_equals_transformers(tmp_path: Path, build: Callable[..., Any], rope: dict[str, Any]) -> None:
    """In prompts that are shorter and longer than those of the training, as transformers 5 saves the config."""
    model = build("Qwen3Model" if build is qwen3 else "Qwen3VLTextModel", rope_parameters=rope)
    randomize(model)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    text_encoder = TextEncoder.open(ModelOptions(str(tmp_path), compute_dtype="float32"))
    prompts = random_prompts([600, 100, 64, 7, 1])
    theirs = their_hidden_states(model.eval(), prompts, 600, PAD_TOKEN_ID)
    ours = our_hidden_states(text_encoder, prompts, 600)

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
    jobs = [
        Job(prompt, window, window, 0, taps=taps, combine="stack", dtype="float32", pad_token_id=PAD_TOKEN_ID)
        for prompt in prompts
    ]
    results = text_encoder.run(jobs)
    return np.stack([result.hidden_states for result in results if isinstance(result, PromptEmbeds)], axis=1)


@pytest.mark.parametrize("explicit", [pytest.param(False, id="range"), pytest.param(True, id="position-ids")])
@pytest.mark.parametrize("rope_theta", [10_000.0, 1_000_000.0, 5_000_000.0])
def test_rotation_equals_transformers_at_far_positions(rope_theta: float, explicit: bool) -> None:
    """A frequency that is off in its last bit turns position 2047 by 2e-4, which 36 layers make visible."""
    x = torch.randn(1, 1, 2048, 128, generator=torch.Generator().manual_seed(0))
    config = transformers.Qwen3Config(head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": rope_theta})
    cos, sin = modeling_qwen3.Qwen3RotaryEmbedding(config)(x, torch.arange(2048)[None])
    theirs, _ = modeling_qwen3.apply_rotary_pos_emb(x, x, cos, sin)
    ours = apply_rope(mx.array(x.numpy()), Rope(rope_theta, 128), mx.arange(2048)[None] if explicit else None)

    # One of 64 frequencies may still differ in its last bit, since PyTorch's pow is not rounded correctly.
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), atol=2e-5)
