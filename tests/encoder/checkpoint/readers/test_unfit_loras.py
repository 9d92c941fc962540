"""LoRAs that do not fit: nothing of a LoRA is left out silently, and one line says what is wrong with it."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from encoder import CheckpointError, Lora, ModelOptions, TextEncoder, open_checkpoint
from tests.checkpoints import Array, write_checkpoint, write_tensors
from tests.encoder.checkpoint.lora_files import (
    Pairs,
    dotted,
    kohya,
    make_pairs,
    mlx_lm,
    peft,
    write_gguf_lora,
    write_lora,
    write_peft,
)

Q_PROJ = "lora_te_layers_0_self_attn_q_proj"


@pytest.fixture
def pairs(tmp_path: Path) -> Pairs:
    """For the base model, which lies in `base`."""
    return make_pairs(write_checkpoint(tmp_path / "base"))


def refusal(tmp_path: Path, source: Path | str, scale: float = 1.0) -> str:
    """The error that a LoRA for the model in `base` gives. It is one line."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ModelOptions(str(tmp_path / "base"), loras=(Lora(str(source), scale),)))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def pair(rows: int = 32, columns: int = 16, rank: int = 4, dtype: Any = np.float32) -> dict[str, Array]:
    return {
        f"{Q_PROJ}.lora_up.weight": np.ones((rows, rank), dtype),
        f"{Q_PROJ}.lora_down.weight": np.ones((rank, columns), dtype),
    }


def test_product_that_no_float_holds_is_refused(tmp_path: Path, pairs: Pairs) -> None:
    """Damaged, or trained until it diverged; NumPy would write a warning of its own."""
    huge = {path: (up * np.float32(1e25), down * np.float32(1e25)) for path, (up, down) in pairs.items()}
    source = write_peft(tmp_path / "lora", peft(huge))

    with pytest.raises(CheckpointError, match="has NaN or infinity"):
        TextEncoder.open(ModelOptions(str(tmp_path / "base"), loras=(Lora(str(source)),)))


def renamed(module: str) -> dict[str, Array]:
    return {key.replace(Q_PROJ, module): array for key, array in pair().items()}


MISFITS: dict[str, tuple[dict[str, Array], str]] = {
    "wrong-rows": (pair(rows=64), "(64, 4)"),
    "wrong-columns": (pair(columns=8), "which is no lora for layers.0.self_attn.q_proj.weight of shape (32, 16)"),
    "empty": (pair(rank=0), "(32, 0)"),
    "ranks-differ": (
        pair() | {f"{Q_PROJ}.lora_up.weight": np.ones((32, 3), np.float32)},
        "up F32 (32, 3), down F32 (4, 16)",
    ),
    "half": ({f"{Q_PROJ}.lora_up.weight": np.ones((32, 4), np.float32)}, "has up F32 (32, 4), which is no lora"),
    "convolution": (
        {key: array[..., None, None] for key, array in pair().items()},
        "(32, 4, 1, 1)",
    ),
    "integers": (pair(dtype=np.int8), "I8"),
    "float8": (pair(dtype=ml_dtypes.float8_e4m3fn), "F8_E4M3"),
    "module-unknown": (renamed("lora_te_layers_0_cross_attn_q_proj"), "lora_te_layers_0_cross_attn_q_proj.lora_"),
    "layer-beyond": (renamed("lora_te_layers_9_self_attn_q_proj"), "lora_te_layers_9_self_attn_q_proj.lora_"),
    "middle-matrix": (pair() | {f"{Q_PROJ}.lora_mid.weight": np.ones((4, 4), np.float32)}, "lora_mid"),
    "dora-of-lycoris": (pair() | {f"{Q_PROJ}.dora_scale": np.ones((32, 1), np.float32)}, "dora_scale"),
    "oft": ({f"{Q_PROJ}.oft_blocks": np.ones((4, 4, 4), np.float32)}, "oft_blocks"),
    "glora": ({f"{Q_PROJ}.a1.weight": np.ones((4, 4), np.float32)}, "a1.weight"),
    "tokens": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((4, 16), np.float32)},
        "trainable_tokens_delta",
    ),
    "bias-that-the-model-lacks": (
        {f"{Q_PROJ}.diff_b": np.ones(32, np.float32)},
        "the model has no such parameter",
    ),
    "magnitude": (
        {**dotted(".lora_B.weight", ".lora_A.weight")({"layers.0.self_attn.q_proj": tuple(pair().values())})}
        | {"text_encoder.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(3, np.float32)},
        "expected magnitude of shape (32,)",
    ),
    "loha": (
        {f"{Q_PROJ}.hada_{name}": np.ones((4, 4), np.float32) for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
        "which is no loha",
    ),
    "lokr": ({f"{Q_PROJ}.lokr_w1": np.ones((4, 4), np.float32)}, "which is no lokr"),
    "alpha-alone": (pair() | {"lora_te_norm.alpha": np.array(1, np.float32)}, "lora_te_norm.alpha"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_key_that_does_not_fit_is_named(tmp_path: Path, pairs: Pairs, case: str) -> None:
    tensors, named = MISFITS[case]
    file = write_lora(tmp_path / "lora.safetensors", tensors)

    message = refusal(tmp_path, file)

    assert str(file) in message
    assert named in message
    assert "made for another model" in message


def test_of_many_keys_that_do_not_fit_a_few_are_named(tmp_path: Path, pairs: Pairs) -> None:
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs, "lora_te_text_"))

    assert "; and 15 more." in refusal(tmp_path, file)


def test_lora_of_another_size_is_refused_with_both_shapes(tmp_path: Path, pairs: Pairs) -> None:
    larger = make_pairs(write_checkpoint(tmp_path / "larger", hidden_size=24))
    folder = write_peft(tmp_path / "lora", peft(larger))

    message = refusal(tmp_path, folder)

    assert "down F32 (4, 24)" in message
    assert "(32, 16)" in message


def test_lora_of_the_diffusion_model_alone_is_refused(tmp_path: Path, pairs: Pairs) -> None:
    tensors = dotted(".lora_B.weight", ".lora_A.weight", "transformer.")(pairs) | kohya(pairs, "lora_unet_")
    file = write_lora(tmp_path / "lora.safetensors", tensors)

    message = refusal(tmp_path, file)

    assert "has no LoRA for this text encoder; it holds 30 arrays for the diffusion model" in message


def test_what_belongs_to_other_models_is_counted_in_one_warning(tmp_path: Path, pairs: Pairs) -> None:
    other = {
        "diffusion_model.blocks.0.attn.q_proj.lora_A.weight": np.ones((4, 16), np.float32),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": np.ones((), np.float32),
        "base_model.model.lm_head.lora_A.weight": np.ones((4, 16), np.float32),
        "base_model.model.model.visual.blocks.0.mlp.lora_A.weight": np.ones((4, 16), np.float32),
    }
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs) | other)

    [warning] = warnings_of(tmp_path / "base", Lora(str(file)))

    for owner in ("the diffusion model", "another text encoder", "the head", "the vision tower"):
        assert f"1 arrays for {owner}" in warning


@pytest.mark.parametrize("trainer", ["peft", "mlx-lm"])
def test_file_without_the_config_that_belongs_to_it_is_merged_with_a_warning(
    tmp_path: Path, pairs: Pairs, trainer: str
) -> None:
    """Alpha stands in adapter_config.json alone: to take the rank for it is a guess."""
    file = write_lora(tmp_path / "style.safetensors", peft(pairs) if trainer == "peft" else mlx_lm(pairs))

    [warning] = warnings_of(tmp_path / "base", Lora(str(file)))

    assert warning == f"{file}: no adapter_config.json lies beside it to say alpha, which is taken to be the rank"


def test_config_of_another_file_is_not_used(tmp_path: Path, pairs: Pairs) -> None:
    """A kohya file says alpha itself, or means the rank."""
    folder = write_peft(tmp_path / "lora", peft(pairs), lora_alpha="no number")
    file = write_lora(folder / "style.safetensors", kohya(pairs, alpha=None))

    assert warnings_of(tmp_path / "base", Lora(str(file))) == ()


def test_whole_model_is_no_lora(tmp_path: Path, pairs: Pairs) -> None:
    assert "Give it as --model" in refusal(tmp_path, tmp_path / "base" / "model.safetensors")


@pytest.mark.parametrize("source", ["", "nothing", "x" * 5000, "a\0", "C:\\loras\\style"])
def test_source_that_is_nothing_says_what_was_looked_for(tmp_path: Path, pairs: Pairs, source: str) -> None:
    assert "no such folder or file, and not a hub id" in refusal(tmp_path, source)


def test_two_loras_in_one_file_are_refused(tmp_path: Path, pairs: Pairs) -> None:
    tensors = peft(pairs, adapter="first") | peft(pairs, adapter="second")
    folder = write_peft(tmp_path / "lora", tensors)

    assert "expected one LoRA" in refusal(tmp_path, folder)


def test_whole_weights_cannot_be_scaled(tmp_path: Path, pairs: Pairs) -> None:
    tensors = kohya(pairs) | {"text_encoder.model.norm.weight": np.ones(16, np.float32)}
    file = write_lora(tmp_path / "lora.safetensors", tensors)

    assert "cannot be scaled. Leave out :0.5" in refusal(tmp_path, file, 0.5)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "ia3": ({"peft_type": "IA3"}, "peft_type is 'IA3', expected LORA"),
    "no-type": ({"peft_type": None}, "peft_type is None, expected LORA"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "bias": ({"lora_bias": True}, "lora_bias"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
    "alpha-a-text": ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
    "alpha-infinite": ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    "mlx-dora": ({"lora_parameters": {"scale": 1}, "fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
    "mlx-no-scale": ({"lora_parameters": {}}, "lora_parameters.scale is None"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_kind_that_is_not_computed_is_refused_by_its_name(tmp_path: Path, pairs: Pairs, case: str) -> None:
    config, named = CONFIGS[case]
    folder = write_peft(tmp_path / "lora", peft(pairs), **config)

    message = refusal(tmp_path, folder)

    assert "adapter_config.json" in message
    assert named in message


def test_dora_without_its_magnitudes_is_refused(tmp_path: Path, pairs: Pairs) -> None:
    """Merged as a LoRA, it would be another change."""
    folder = write_peft(tmp_path / "lora", peft(pairs), use_dora=True)

    assert "has no magnitudes, but use_dora is set" in refusal(tmp_path, folder)


def test_folder_around_a_lora_is_opened_and_around_several_refused(tmp_path: Path, pairs: Pairs) -> None:
    write_peft(tmp_path / "lora" / "first", peft(pairs))
    assert warnings_of(tmp_path / "base", Lora(str(tmp_path / "lora"))) == ()

    write_peft(tmp_path / "lora" / "second", peft(pairs))
    assert f"Name one of its folders: {tmp_path / 'lora' / 'first'}, " in refusal(tmp_path, tmp_path / "lora")


def with_header(text: str) -> Callable[[Path, Pairs], Path]:
    return lambda folder, pairs: write_lora(folder / "x.safetensors", kohya(pairs), lora_adapter_metadata=text)


def with_alpha(alpha: Array) -> Callable[[Path, Pairs], Path]:
    return lambda folder, pairs: write_lora(folder / "x.safetensors", pair() | {f"{Q_PROJ}.alpha": alpha})


def with_content(name: str, content: bytes) -> Callable[[Path, Pairs], Path]:
    def write(folder: Path, pairs: Pairs) -> Path:
        folder.mkdir()
        (folder / name).write_bytes(content)
        return folder / name

    return write


def several(folder: Path, pairs: Pairs) -> Path:
    for name in ("epoch-1", "epoch-2"):
        write_lora(folder / f"{name}.safetensors", kohya(pairs))
    return folder


DAMAGED: dict[str, tuple[Callable[[Path, Pairs], Path], str]] = {
    "header-no-json": (with_header("{"), "lora_adapter_metadata: cannot be read as JSON"),
    "header-a-list": (with_header("[]"), "expected an object"),
    "header-nested": (with_header("[" * 100_000), "lora_adapter_metadata"),
    "alpha-nan": (with_alpha(np.array(np.nan, np.float32)), "expected one finite number"),
    "alpha-two": (with_alpha(np.ones(2, np.float32)), "expected one finite number"),
    "alpha-bytes": (with_alpha(np.ones((), np.uint8)), "expected one finite number"),
    "empty-folder": (lambda folder, pairs: with_content("readme.md", b"")(folder, pairs).parent, "holds no LoRA"),
    "several": (several, "epoch-1.safetensors, epoch-2.safetensors. Name the one"),
    "pickle": (with_content("lora.pt", b"PK"), "is a pickle"),
    "pickle-in-folder": (
        lambda folder, pairs: with_content("adapter_model.bin", b"PK")(folder, pairs).parent,
        "adapter_model.bin: is a pickle",
    ),
    "cut": (with_content("lora.safetensors", struct.pack("<Q", 100)), "cannot be read as safetensors"),
    "missing": (lambda folder, pairs: folder / "gone.safetensors", "no such folder or file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_file_that_cannot_be_read_is_named(tmp_path: Path, pairs: Pairs, case: str) -> None:
    write, named = DAMAGED[case]

    assert named in refusal(tmp_path, write(tmp_path / "lora", pairs))


GGUF: dict[str, tuple[dict[str, str], str]] = {
    "model": ({"general.type": "model"}, "general.type is 'model', expected adapter"),
    "llama": ({"architecture": "llama"}, "general.architecture is 'llama', expected qwen3"),
    "activated": ({"adapter.alora.invocation_tokens": "1"}, "activated LoRA"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf_that_is_no_lora_of_a_qwen3_is_refused(tmp_path: Path, pairs: Pairs, case: str) -> None:
    metadata, named = GGUF[case]

    assert named in refusal(tmp_path, write_gguf_lora(tmp_path / "lora.gguf", pairs, **metadata))


def test_gguf_lora_of_another_model_is_refused(tmp_path: Path, pairs: Pairs) -> None:
    larger = make_pairs(write_checkpoint(tmp_path / "larger", num_hidden_layers=3))

    message = refusal(tmp_path, write_gguf_lora(tmp_path / "lora.gguf", larger))

    assert "layers.2.self_attn.q_proj.weight.lora_a is no part of a LoRA for a weight of it" in message


def as_model(source: Path) -> str:
    """The error that this gives as the model."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(ModelOptions(str(source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["", "adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("with_config", [False, True])
def test_lora_as_the_model_is_answered_with_the_command(
    tmp_path: Path, pairs: Pairs, name: str, with_config: bool
) -> None:
    """The config and the tokenizer of the base model are in the folder, too, where some trainers put them."""
    folder = write_peft(tmp_path / "lora", peft(pairs))
    if with_config:
        shutil.copy(tmp_path / "base" / "config.json", folder)
        shutil.copy(tmp_path / "base" / "tokenizer.json", folder)

    message = as_model(folder / name)

    assert "is a LoRA and no model. Give" in message
    assert message.endswith(f"--model Qwen/Qwen3-4B --lora {folder / name}")


def test_lora_file_as_the_model_is_answered_with_the_setting(tmp_path: Path, pairs: Pairs) -> None:
    for file in (
        write_lora(tmp_path / "style.safetensors", kohya(pairs)),
        write_gguf_lora(tmp_path / "style.gguf", pairs),
    ):
        assert "--lora" in as_model(file)


def warnings_of(folder: Path, *loras: Lora) -> tuple[str, ...]:
    return open_checkpoint(ModelOptions(str(folder), loras=loras)).warnings


def test_lora_beside_the_model_is_merged_or_warned_of(tmp_path: Path, pairs: Pairs) -> None:
    folder = tmp_path / "base"
    write_peft(folder, peft(pairs))

    [warning] = warnings_of(folder)

    assert warning == f"{folder} holds a LoRA that is not applied; --lora {folder} merges it"
    assert warnings_of(folder, Lora(str(folder))) == ()
    assert warnings_of(folder, Lora(str(folder / "adapter_model.safetensors"))) == ()


def test_lora_in_the_file_of_a_model_is_warned_of(tmp_path: Path, pairs: Pairs) -> None:
    """What stayed there when the model was saved beside a LoRA."""
    write_checkpoint(tmp_path / "base", extra=dict(peft(pairs, "model.", "default")))

    [warning] = warnings_of(tmp_path / "base")

    assert "not applied: 12 tensors (model.layers.0.mlp.down_proj.lora_A.default.weight, " in warning
    assert "--lora" in warning
    assert "--lora" in warning


def test_model_saved_with_a_lora_that_is_not_merged_is_refused(tmp_path: Path, pairs: Pairs) -> None:
    """Without the LoRA, and its alpha, the weights are not those of the model that was trained."""
    weights = write_checkpoint(tmp_path / "base")
    wrapped = {f"{path}.weight": f"{path}.base_layer.weight" for path in pairs}
    named = {f"model.{wrapped.get(name, name)}": weight for name, weight in weights.items()}
    write_tensors(tmp_path / "base", named | peft(pairs, "model.", "default"))

    assert "is not merged; merge it" in as_model(tmp_path / "base")


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("style.safetensors", "style.safetensors", 1),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style:-1", "style", -1),
        ("style:1e-1", "style", 0.1),
        (r"C:\loras\style", r"C:\loras\style", 1),
        (r"C:\loras\style:.5", r"C:\loras\style", 0.5),
        ("org/name@v1:2", "org/name@v1", 2),
        ("style:v2", "style:v2", 1),
        ("style:nan", "style:nan", 1),
    ],
)
def test_scale_stands_after_the_last_colon(text: str, source: str, scale: float) -> None:
    assert Lora.parse(text) == Lora(source, scale)
