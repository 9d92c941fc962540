"""Writes the checkpoints and hidden states in this folder, with transformers, on the CPU, in float32.

    python tests/golden/make_golden.py

Needs what `make test-parity` installs; the files here came from torch 2.13.0 and transformers 5.23.0. They are small
enough to commit, so that the tests compare with transformers without having it. Each folder holds the checkpoint as
transformers saves it (config.json, model.safetensors in bfloat16) and expected.safetensors: input_ids (B, L),
num_tokens (B,) and hidden_states (n, B, L, D), of which the metadata name the Hugging Face indices.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

HERE = Path(__file__).parent
PAD = 0  # any token will do: the mask hides it from the others, and it must still come out as transformers has it


def main() -> None:
    """Every golden folder, from fixed seeds."""
    torch.manual_seed(0)
    small = Qwen3Config(  # hidden_size / num_attention_heads is not head_dim; neither eps nor theta is the default
        hidden_size=36,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=48,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5_000_000.0},
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    write("small", Qwen3ForCausalLM(small), num_tokens=[13, 8, 1], window=16, indices=range(3))
    deep = Qwen3Config(  # as deep as FLUX.2 klein's taps need, and one more for the one before the last
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    write("deep", Qwen3Model(deep), num_tokens=[21, 9], window=32, indices=(0, 9, 18, 27, 28))


def write(name: str, model: PreTrainedModel, num_tokens: Sequence[int], window: int, indices: Sequence[int]) -> None:
    """One folder: the checkpoint, and its hidden states for random prompts that are padded to the window."""
    randomize(model)
    folder = HERE / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    lengths = torch.tensor(num_tokens)
    attention_mask = torch.arange(window) < lengths[:, None]  # (B, L)
    input_ids = torch.randint(model.config.vocab_size, attention_mask.shape).where(attention_mask, PAD)
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask.long(), output_hidden_states=True)
    save_file(
        {
            "input_ids": input_ids.int(),
            "num_tokens": lengths.int(),
            "hidden_states": torch.stack([output.hidden_states[k] for k in indices]),
        },
        folder / "expected.safetensors",
        metadata={"indices": json.dumps(list(indices))},
    )


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Weights that leave nothing neutral: fresh norms are ones, fresh matrices so small that layers hardly matter."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 2.0)
        else:
            parameter.normal_(std=parameter.shape[1] ** -0.5)


if __name__ == "__main__":
    main()
