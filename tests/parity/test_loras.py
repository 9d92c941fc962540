"""LoRAs that PEFT and LyCORIS saved, here and in their own libraries."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, Lora, ModelOptions, TextEncoder
from tests.checkpoints import write_tokenizer
from tests.parity.random_weights import randomize
from tests.reference import relative_error

torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

pytestmark = pytest.mark.parity

CLOSE = 3e-5  # both sides round in float32, in another order: up to 1e-5. A wrong formula is off by 1e-3 and more
PROMPT = "a cat on a red sofa"


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A Qwen3 with random weights, saved in `base`."""
    config = transformers.Qwen3Config(
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        vocab_size=300,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    return model


def shake(model: Any) -> None:
    """What training would do to the adapter, whose fresh matrices change nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def assert_same(folder: Path, merged: Any, *loras: Lora) -> None:
    """Compare hidden states of the checkpoint in `folder` with LoRAs, and those of the merged model."""
    encoder = TextEncoder.open(ModelOptions(str(folder), loras=loras, compute_dtype="float32"))
    [found] = encoder.encode([PROMPT], LAST_HIDDEN_STATE, "float32")
    [tokenized] = encoder.tokenize([PROMPT], LAST_HIDDEN_STATE)
    with torch.no_grad():
        ids = torch.tensor([list(tokenized.input_ids)])
        expected = merged(ids, output_hidden_states=True).hidden_states[-1][0].numpy()
    plain = TextEncoder.open(ModelOptions(str(folder), compute_dtype="float32"))
    [base] = plain.encode([PROMPT], LAST_HIDDEN_STATE, "float32")

    assert relative_error(found.hidden_states, expected) < CLOSE
    assert relative_error(np.asarray(base.hidden_states), expected) > 0.05  # the LoRA matters


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"^model.layers.2.self_attn.v_proj": 3, "o_proj": 24},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved-whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "norm"],
    },
    "some-layers": {"target_modules": LINEAR, "layers_to_transform": [1]},
    "biases": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", PEFT)
def test_peft_merges_its_adapter_into_the_same_model(tmp_path: Path, model: Any, case: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=10, **PEFT[case]))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "lora")

    assert_same(tmp_path / "base", adapted.merge_and_unload(), Lora(str(tmp_path / "lora")))


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_merges_two_adapters_one_after_the_other(tmp_path: Path, model: Any, use_dora: bool) -> None:
    """Rows of both are rescaled by their lengths before either was merged."""
    peft = pytest.importorskip("peft", reason="needs peft")
    configs = {
        name: peft.LoraConfig(target_modules=LINEAR, r=r, lora_alpha=5) for name, r in {"first": 4, "second": 2}.items()
    }
    configs["second"].use_dora = use_dora
    adapted = peft.get_peft_model(model, configs["first"], adapter_name="first")
    adapted.add_adapter("second", configs["second"])
    for name in configs:
        adapted.set_adapter(name)
        shake(adapted)
    adapted.save_pretrained(tmp_path)

    merged = adapted.merge_and_unload(adapter_names=list(configs))

    assert_same(tmp_path / "base", merged, *(Lora(str(tmp_path / name)) for name in configs))


def test_peft_scales_its_adapter_by_the_same_number(tmp_path: Path, model: Any) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=LINEAR, r=4, lora_alpha=10))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "lora")
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.4)

    assert_same(tmp_path / "base", adapted.merge_and_unload(), Lora(str(tmp_path / "lora"), 0.4))


LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-both": {"algo": "lokr", "factor": 4, "decompose_both": True, "linear_dim": 1},
    "lokr-whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
}


@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris_computes_the_same_with_its_network(tmp_path: Path, model: Any, case: str) -> None:
    """Its forward pass, as in training. Its own `merge_to` of LoHa and LoKr scales twice, at least until 4.1.3."""
    lycoris = pytest.importorskip("lycoris", reason="needs lycoris-lora")
    names = {"target_module": ["Qwen3Attention", "Qwen3MLP"], "lora_prefix": "lora_te"}
    lycoris.LycorisNetwork.apply_preset(names)
    network = lycoris.create_lycoris(model, **({"multiplier": 1.0, "linear_dim": 4, "linear_alpha": 6} | LYCORIS[case]))
    network.apply_to()
    shake(network)
    network.save_weights(str(tmp_path / "lora.safetensors"), torch.float32, {"trainer": "lycoris"})

    assert_same(tmp_path / "base", model, Lora(str(tmp_path / "lora.safetensors")))
