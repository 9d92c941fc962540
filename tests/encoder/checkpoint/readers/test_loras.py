"""LoRAs: under every trainer's names they make of the model what a merge in float64 makes of it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from encoder import LAST_HIDDEN_STATE, Lora, MergedLora, ModelOptions, TextEncoder, open_checkpoint
from encoder.checkpoint import convert_checkpoint
from encoder.checkpoint.loading.memory import bytes_needed
from encoder.checkpoint.loading.parameters import read_parameters
from encoder.checkpoint.loading.residency import plan_residents
from tests.checkpoints import Array, write_checkpoint, write_tensors
from tests.encoder.checkpoint.lora_files import (
    ALPHA,
    RANK,
    Pairs,
    as_bfloat16,
    dotted,
    kohya,
    make_pairs,
    merged,
    mlx_lm,
    peft,
    write_gguf_lora,
    write_lora,
    write_peft,
)
from tests.encoder.checkpoint.mlx_folders import write_quantized

FACTOR = ALPHA / RANK


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Array]:
    """Of the base model, which lies in `base`."""
    return dict(write_checkpoint(tmp_path / "base"))


@pytest.fixture
def pairs(weights: dict[str, Array]) -> Pairs:
    return make_pairs(weights)


def encode(model: Path, *loras: Lora, **options: Any) -> Array:
    encoder = TextEncoder.open(ModelOptions(str(model), loras=loras, compute_dtype="float32", **options))
    [embeds] = encoder.encode(["a cat on a red sofa"], LAST_HIDDEN_STATE, "float32")
    return np.asarray(embeds.hidden_states)


def reference(folder: Path, weights: Mapping[str, Array]) -> Array:
    """Hidden states of a checkpoint that has these weights to begin with."""
    write_checkpoint(folder)
    write_tensors(folder, {f"model.{name}": weight.astype(np.float32) for name, weight in weights.items()})
    return encode(folder)


def assert_equal(found: Array, expected: Array) -> None:
    """To 1e-5 of the largest: float32 against float64."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


NAMINGS: dict[str, tuple[Callable[[Pairs], dict[str, Array]], float]] = {
    "kohya": (kohya, FACTOR),
    "kohya-te1": (lambda pairs: kohya(pairs, "lora_te1_model_"), FACTOR),
    "kohya-te3": (lambda pairs: kohya(pairs, "lora_te3_"), FACTOR),
    "kohya-vl": (lambda pairs: kohya(pairs, "lora_te_model_language_model_"), FACTOR),
    "kohya-no-alpha": (lambda pairs: kohya(pairs, alpha=None), 1),
    "kohya-float16": (lambda pairs: kohya(pairs, dtype=np.float16), FACTOR),
    "diffusers": (dotted(".lora_B.weight", ".lora_A.weight"), 1),
    "diffusers-old": (dotted(".lora.up.weight", ".lora.down.weight"), 1),
    "diffusers-older": (dotted(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"), 1),
    "diffusers-oldest": (dotted("_lora.up.weight", "_lora.down.weight"), 1),
    "second-encoder": (dotted(".lora_B.weight", ".lora_A.weight", "text_encoder_2."), 1),
    "comfyui": (dotted(".lora_B.weight", ".lora_A.weight", "text_encoders.qwen3_06b.transformer.model."), 1),
    "onetrainer": (dotted(".lora_up.weight", ".lora_down.weight"), 1),
    "bare": (dotted(".lora_B.default.weight", ".lora_A.default.weight", ""), 1),
    "mochi": (dotted(".lora_B", ".lora_A"), 1),
    "vl": (dotted(".lora_B.weight", ".lora_A.weight", "base_model.model.model.language_model."), 1),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_file_of_every_trainer_is_merged(tmp_path: Path, weights: dict[str, Array], pairs: Pairs, naming: str) -> None:
    name_them, factor = NAMINGS[naming]
    if "float16" in naming:
        pairs = {path: (up.astype(np.float16), down.astype(np.float16)) for path, (up, down) in pairs.items()}
    file = write_lora(tmp_path / "style.safetensors", name_them(pairs))

    found = encode(tmp_path / "base", Lora(str(file), 0.5))

    assert_equal(found, reference(tmp_path / "merged", merged(weights, pairs, factor * 0.5)))


PEFT_CONFIGS: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "alpha": ({}, lambda path: FACTOR),
    "rslora": ({"use_rslora": True}, lambda path: ALPHA / RANK**0.5),
    "alpha-pattern": (
        {"alpha_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 12}},
        lambda path: {"layers.1.mlp.down_proj": 12, "q": 2}.get("q" if "q_proj" in path else path, ALPHA) / RANK,
    ),
    "rank-pattern": ({"r": 64, "rank_pattern": {".*": RANK}}, lambda path: FACTOR),
    "no-alpha": ({"lora_alpha": None}, lambda path: 1),
}


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_peft_folder_is_scaled_as_its_config_says(
    tmp_path: Path, weights: dict[str, Array], pairs: Pairs, case: str
) -> None:
    config, factor = PEFT_CONFIGS[case]
    folder = write_peft(tmp_path / "lora", peft(pairs), **config)

    found = encode(tmp_path / "base", Lora(str(folder)))

    scaled = {path: (up * factor(path), down) for path, (up, down) in pairs.items()}
    assert_equal(found, reference(tmp_path / "merged", merged(weights, scaled, 1)))


@pytest.mark.parametrize("adapter", ["", "default", "weight"])
def test_file_in_a_peft_folder_is_scaled_by_the_config_beside_it(
    tmp_path: Path, weights: dict[str, Array], pairs: Pairs, adapter: str
) -> None:
    folder = write_peft(tmp_path / "lora", peft(pairs, adapter=adapter))

    found = encode(tmp_path / "base", Lora(str(folder / "adapter_model.safetensors")))

    assert_equal(found, reference(tmp_path / "merged", merged(weights, pairs, FACTOR)))


def test_mlx_lm_folder_is_scaled_by_its_own_scale(tmp_path: Path, weights: dict[str, Array], pairs: Pairs) -> None:
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": RANK, "scale": 3.0, "dropout": 0}}
    write_lora(tmp_path / "lora" / "adapters.safetensors", mlx_lm(pairs), config)

    found = encode(tmp_path / "base", Lora(str(tmp_path / "lora")))

    assert_equal(found, reference(tmp_path / "merged", merged(weights, pairs, 3)))


@pytest.mark.parametrize("prefix", ["text_encoder.", ""])
def test_alpha_in_the_header_of_a_diffusers_file_counts(
    tmp_path: Path, weights: dict[str, Array], pairs: Pairs, prefix: str
) -> None:
    """Written beside the fields of the diffusion model, or alone."""
    fields = {f"{prefix}lora_alpha": ALPHA, f"{prefix}r": RANK} | ({"transformer.lora_alpha": 99} if prefix else {})
    file = write_lora(
        tmp_path / "pytorch_lora_weights.safetensors",
        dotted(".lora_B.weight", ".lora_A.weight")(pairs),
        lora_adapter_metadata=json.dumps(fields),
    )

    found = encode(tmp_path / "base", Lora(str(file)))

    assert_equal(found, reference(tmp_path / "merged", merged(weights, pairs, FACTOR)))


def test_several_loras_add_up(tmp_path: Path, weights: dict[str, Array], pairs: Pairs) -> None:
    others = make_pairs(weights, ("self_attn.q_proj", "mlp.up_proj"), seed=2)
    first = write_lora(tmp_path / "first.safetensors", kohya(pairs))
    second = write_lora(tmp_path / "second.safetensors", kohya(others))

    found = encode(tmp_path / "base", Lora(str(first), 0.8), Lora(str(second), -0.25))

    both = merged(merged(weights, pairs, 0.8 * FACTOR), others, -0.25 * FACTOR)
    assert_equal(found, reference(tmp_path / "merged", both))


def as_embedding(weight: Array, seed: int = 3) -> tuple[Array, Array, Array]:
    """PEFT's lora_embedding_A and lora_embedding_B, and what they add to the embedding."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((RANK, len(weight))), random.standard_normal((weight.shape[1], RANK))
    return a.astype(np.float32), b.astype(np.float32), (b @ a).T


def test_embedding_is_changed_by_peft_with_the_copy_of_itself_that_it_saves(
    tmp_path: Path, weights: dict[str, Array]
) -> None:
    """PEFT saves the embedding beside its LoRA where it is a target, as `base_layer`."""
    weight = weights["embed_tokens.weight"]
    a, b, delta = as_embedding(weight)
    path = "base_model.model.model.embed_tokens"
    tensors = {
        f"{path}.lora_embedding_A": a,
        f"{path}.lora_embedding_B": b,
        f"{path}.base_layer.weight": weight * 2,
    }
    folder = write_peft(tmp_path / "lora", tensors)

    found = encode(tmp_path / "base", Lora(str(folder)))

    changed = {**weights, "embed_tokens.weight": weight * 2 + FACTOR * delta}
    assert_equal(found, reference(tmp_path / "merged", changed))


def test_mlx_lm_has_the_matrices_of_an_embedding_the_other_way_round(tmp_path: Path, weights: dict[str, Array]) -> None:
    a, b, delta = as_embedding(weights["embed_tokens.weight"])
    tensors = {"model.embed_tokens.lora_a": a.T, "model.embed_tokens.lora_b": b.T}
    write_lora(tmp_path / "lora" / "adapters.safetensors", tensors, {"lora_parameters": {"scale": 0.5}})

    found = encode(tmp_path / "base", Lora(str(tmp_path / "lora")))

    changed = {**weights, "embed_tokens.weight": weights["embed_tokens.weight"] + 0.5 * delta}
    assert_equal(found, reference(tmp_path / "merged", changed))


def test_module_saved_whole_takes_the_place_of_the_base_model_s(tmp_path: Path, weights: dict[str, Array]) -> None:
    """`modules_to_save` of PEFT: the embedding of a model that has learnt new words."""
    pairs = make_pairs(weights)
    embedding = weights["embed_tokens.weight"][::-1]
    folder = write_peft(tmp_path / "lora", peft(pairs) | {"base_model.model.model.embed_tokens.weight": embedding})

    found = encode(tmp_path / "base", Lora(str(folder)))

    changed = merged(weights, pairs, FACTOR) | {"embed_tokens.weight": embedding}
    assert_equal(found, reference(tmp_path / "merged", changed))


def test_dora_rescales_rows_to_its_magnitudes(tmp_path: Path, weights: dict[str, Array], pairs: Pairs) -> None:
    tensors, changed = peft(pairs), merged(weights, pairs, FACTOR)
    for path in pairs:
        rows = changed[f"{path}.weight"]
        magnitude = np.random.default_rng(4).uniform(0.5, 2, len(rows)).astype(np.float32)
        tensors[f"base_model.model.model.{path}.lora_magnitude_vector"] = magnitude
        changed[f"{path}.weight"] = rows * (magnitude / np.linalg.norm(rows, axis=1))[:, None]
    folder = write_peft(tmp_path / "lora", tensors, use_dora=True)

    found = encode(tmp_path / "base", Lora(str(folder)))

    assert_equal(found, reference(tmp_path / "merged", changed))


@pytest.mark.parametrize("place", ["style.sft", "blob", "folder", "file-url", "hub-cache", "gguf-folder"])
def test_lora_is_found_wherever_a_model_would_be(tmp_path: Path, weights: dict[str, Array], place: str) -> None:
    """Blobs have no suffix, ComfyUI has another one, and the hub's cache has folders around it."""
    pairs = make_pairs(weights)
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs))
    expected = fingerprint(tmp_path / "base", Lora(str(file)))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    for folder in (tmp_path / "folder", tmp_path / "gguf-folder", snapshot):
        folder.mkdir(parents=True)
    for copy in ("style.sft", "blob", "folder/style.safetensors", snapshot / "style.safetensors"):
        shutil.copy(file, tmp_path / copy)
    write_gguf_lora(tmp_path / "gguf-folder" / "lora.gguf", pairs)
    sources = {"file-url": f"file://{file}", "hub-cache": str(tmp_path / "models--org--name")}

    found = fingerprint(tmp_path / "base", Lora(sources.get(place, str(tmp_path / place))))

    assert found == expected


@pytest.mark.parametrize("alpha", [ALPHA, 0])
def test_gguf_lora_is_merged_as_llama_cpp_applies_it(tmp_path: Path, weights: dict[str, Array], alpha: float) -> None:
    """Without an alpha, which is stored as 0, it applies the product as it is."""
    pairs = make_pairs(weights, ("self_attn.q_proj", "mlp.down_proj", "embed_tokens"))
    file = write_gguf_lora(tmp_path / "lora.gguf", pairs, alpha)

    found = encode(tmp_path / "base", Lora(str(file)))

    assert_equal(found, reference(tmp_path / "merged", merged(weights, pairs, FACTOR if alpha else 1)))


def random_arrays(**shapes: tuple[int, ...]) -> dict[str, Array]:
    random = np.random.default_rng(5)
    return {name: random.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}


LYCORIS: dict[str, tuple[dict[str, tuple[int, ...]], Callable[[dict[str, Array]], Array]]] = {
    "loha": (
        {"hada_w1_a": (32, 2), "hada_w1_b": (2, 16), "hada_w2_a": (32, 2), "hada_w2_b": (2, 16)},
        lambda a: (a["hada_w1_a"] @ a["hada_w1_b"]) * (a["hada_w2_a"] @ a["hada_w2_b"]) * 6 / 2,
    ),
    "lokr": (
        {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4)},
        lambda a: np.kron(a["lokr_w1"], a["lokr_w2_a"] @ a["lokr_w2_b"]) * 6 / 2,
    ),
    "lokr-two-products": (
        {"lokr_w1_a": (4, 3), "lokr_w1_b": (3, 2), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)},
        lambda a: np.kron(a["lokr_w1_a"] @ a["lokr_w1_b"], a["lokr_w2_a"] @ a["lokr_w2_b"]) * 6 / 2,
    ),
    "lokr-whole": ({"lokr_w1": (4, 4), "lokr_w2": (8, 4)}, lambda a: np.kron(a["lokr_w1"], a["lokr_w2"])),
    "diff": ({"diff": (32, 16)}, lambda a: a["diff"]),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_is_added_as_comfyui_adds_it(tmp_path: Path, weights: dict[str, Array], kind: str) -> None:
    """Alpha is divided by the rank where something is a product, and plays no part where nothing is."""
    shapes, delta = LYCORIS[kind]
    arrays = random_arrays(**shapes)
    name = "lora_te_layers_0_self_attn_q_proj"
    tensors = {f"{name}.{part}": array for part, array in arrays.items()} | {f"{name}.alpha": np.array(6, np.float32)}
    file = write_lora(tmp_path / "lora.safetensors", tensors)

    found = encode(tmp_path / "base", Lora(str(file), 0.5))

    changed = {key: weight.astype(np.float64) for key, weight in weights.items()}
    changed["layers.0.self_attn.q_proj.weight"] += 0.5 * delta(arrays)
    assert_equal(found, reference(tmp_path / "merged", changed))


def test_norm_is_changed_by_its_difference(tmp_path: Path, weights: dict[str, Array]) -> None:
    difference = np.linspace(-1, 1, 16, dtype=np.float32)
    file = write_lora(tmp_path / "lora.safetensors", {"lora_te_norm.w_norm": difference})

    found = encode(tmp_path / "base", Lora(str(file)))

    assert_equal(found, reference(tmp_path / "merged", {**weights, "norm.weight": weights["norm.weight"] + difference}))


def test_quantized_weight_is_merged_as_the_floats_that_it_stands_for(tmp_path: Path) -> None:
    """Weights that no LoRA changes stay as they are."""
    decoded = write_quantized(tmp_path / "base", {"bits": 4, "group_size": 64})
    pairs = make_pairs(decoded)
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs))
    checkpoint = open_checkpoint(ModelOptions(str(tmp_path / "base"), loras=(Lora(str(file)),)))

    tensors = checkpoint.weights.tensors
    residents = plan_residents(list(tensors.values()), mx.float32, None, keep=True)
    read: dict[str, mx.array] = {}
    for parameters in read_parameters(checkpoint, residents):
        read |= parameters

    expected = merged(decoded, pairs, FACTOR)
    for path in pairs:
        np.testing.assert_allclose(np.array(read[f"{path}.weight"]), expected[f"{path}.weight"], rtol=1e-5, atol=1e-6)
    assert checkpoint.quantization == "affine 4-bit in groups of 64"
    assert {tensors[f"{path}.weight"].encoding.mlx_quantization for path in pairs} == {None}


def test_merged_weights_are_quantized_where_that_is_asked_for(tmp_path: Path) -> None:
    """Equal to quantizing a checkpoint that has the merged weights."""
    weights = write_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=128, head_dim=16)
    pairs = make_pairs(weights)
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs))
    convert_checkpoint(
        open_checkpoint(ModelOptions(str(tmp_path / "base"), loras=(Lora(str(file)),))), tmp_path / "new"
    )

    found = encode(tmp_path / "base", Lora(str(file)), quantize="8")

    assert_equal(found, encode(tmp_path / "new", quantize="8"))


def test_converted_folder_has_the_merged_weights(tmp_path: Path, weights: dict[str, Array], pairs: Pairs) -> None:
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs))
    convert_checkpoint(
        open_checkpoint(ModelOptions(str(tmp_path / "base"), loras=(Lora(str(file)),))), tmp_path / "new"
    )

    assert_equal(encode(tmp_path / "new"), reference(tmp_path / "merged", merged(weights, pairs, FACTOR)))


def test_weights_in_bfloat16_are_merged_without_rounding_to_it(tmp_path: Path) -> None:
    """A LoRA's changes are smaller than bfloat16's steps."""
    weights = write_checkpoint(tmp_path / "base", dtype="bfloat16")
    pairs = as_bfloat16(make_pairs(weights))
    file = write_lora(tmp_path / "lora.safetensors", kohya(pairs, dtype=ml_dtypes.bfloat16))

    found = encode(tmp_path / "base", Lora(str(file), 0.01))

    assert_equal(found, reference(tmp_path / "merged", merged(weights, pairs, 0.01 * FACTOR)))


def test_layers_that_are_not_loaded_need_no_lora_and_may_have_one(tmp_path: Path, weights: dict[str, Array]) -> None:
    pairs = make_pairs(weights)
    upper = {path: pair for path, pair in pairs.items() if path.startswith("layers.1.")}
    file = write_lora(tmp_path / "lora.safetensors", kohya(upper))
    options = ModelOptions(str(tmp_path / "base"), loras=(Lora(str(file)),), num_layers=1)

    encoder = TextEncoder.open(options)

    assert encoder.num_layers == 1
    assert encoder.info.loras == (MergedLora(str(file), 1.0, len(upper)),)


def fingerprint(model: Path, *loras: Lora) -> str:
    return open_checkpoint(ModelOptions(str(model), loras=loras)).fingerprint


def test_fingerprint_tells_apart_whatever_changes_a_weight(tmp_path: Path, weights: dict[str, Array]) -> None:
    """So no stored result is ever taken for that of another LoRA, scale or alpha."""
    pairs = make_pairs(weights)
    names = {
        "one": kohya(pairs),
        "alpha": kohya(pairs, alpha=7),
        "two": kohya(make_pairs(weights, seed=2)),
        "fewer": kohya(make_pairs(weights, ("self_attn.q_proj",))),
    }
    files = {name: write_lora(tmp_path / f"{name}.safetensors", tensors) for name, tensors in names.items()}
    one, two = Lora(str(files["one"])), Lora(str(files["two"]))

    found = [fingerprint(tmp_path / "base", Lora(str(file))) for file in files.values()]
    found += [
        fingerprint(tmp_path / "base", *loras) for loras in ((), (one, two), (Lora(one.source, 0.5),), (one, one))
    ]

    assert len(set(found)) == len(found) == 8


def test_fingerprint_is_that_of_the_numbers_whatever_their_names(tmp_path: Path, weights: dict[str, Array]) -> None:
    pairs = make_pairs(weights)
    file = write_lora(tmp_path / "kohya.safetensors", kohya(pairs))
    folder = write_peft(tmp_path / "peft", peft(pairs))

    assert fingerprint(tmp_path / "base", Lora(str(file))) == fingerprint(tmp_path / "base", Lora(str(folder)))


def test_memory_for_merging_is_counted(tmp_path: Path, weights: dict[str, Array]) -> None:
    """The weight and its change are in float32 for a moment, whatever is stored."""
    file = write_lora(tmp_path / "lora.safetensors", kohya(make_pairs(weights, ("embed_tokens",))))
    size = weights["embed_tokens.weight"].size
    opened = [open_checkpoint(ModelOptions(str(tmp_path / "base"), loras=loras)) for loras in ((), (Lora(str(file)),))]

    without, needed = (
        bytes_needed(plan_residents(list(checkpoint.weights.tensors.values()), mx.bfloat16, None, keep=True).values())
        for checkpoint in opened
    )

    assert needed - without > 2 * 4 * size
