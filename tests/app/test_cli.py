"""The commands that need no server."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app import wire
from app.cli import main
from tests.checkpoints import write_checkpoint
from tests.encoder.checkpoint.lora_files import kohya, make_pairs, write_lora


def test_encode_writes_what_the_service_answers(client: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    body = {"prompts": ["a cat", ""], "preset": "z-image"}

    code = main(["encode", "a cat", "", "--preset", "z-image", "-o", str(path)])

    written = wire.unpack_safetensors(path.read_bytes())
    answered = wire.unpack_safetensors(client.post("/encode", json=body, headers={"accept": wire.SAFETENSORS}).content)
    assert code == 0
    assert written["hidden_states"].dtype == "bfloat16"
    np.testing.assert_allclose(
        written["hidden_states"].float32(), answered["hidden_states"].float32(), rtol=2**-7, atol=1e-4
    )  # other batch shapes may round the last of bfloat16's 8 bits differently
    np.testing.assert_array_equal(written["attention_mask"].array, answered["attention_mask"].array)
    assert json.loads(written["num_tokens"]) == json.loads(answered["num_tokens"])


def test_encode_writes_numpy_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"

    assert main(["encode", "a cat", "-o", str(path)]) == 0
    assert np.load(path).dtype == np.float32
    assert np.load(path).shape == (1, 5, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["a", "-o", "out.npy", "--dtype", "bfloat16"], ["float32", "safetensors"], id="bfloat16 in NumPy"),
        pytest.param(["a", "bb", "-o", "out.npy"], ["mask", "safetensors"], id="ragged rows in NumPy"),
        pytest.param(["a", "-o", "out.pt"], [".safetensors"], id="other format"),
        pytest.param(["a", "-o", "nowhere/out.npy"], ["nowhere"], id="no folder"),
        pytest.param(["a", "-o", "out.npy", "--preset", "sdxl"], ["sdxl", "z-image"], id="unknown preset"),
        pytest.param(["a", "-o", "out.npy", "--preset", "flux2-klein-4b"], ["2560"], id="preset of another size"),
        pytest.param(["a", "-o", "out.npy", "--model", "./nowhere"], ["nowhere"], id="no model"),
    ],
)
def test_encode_refuses_in_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    code = main(["encode", *arguments])

    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code in (1, 2)
    assert not list(tmp_path.iterdir())
    for word in words:
        assert word in line


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0

    printed = capsys.readouterr().out
    assert "flux2-klein" in printed
    assert "layers [8, 17, 26]" in printed


def test_presets_of_a_file_are_listed_and_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "my.toml", tmp_path / "out.npy"
    file.write_text('[mine]\nlayers = [0, 1]\ndescription = "Two layers."\n')

    listed = main(["presets", "--presets", str(file)])
    encoded = main(["encode", "a cat", "--presets", str(file), "--preset", "mine", "-o", str(output)])

    assert (listed, encoded) == (0, 0)
    assert re.search(r"^mine +512 .*layers \[0, 1\] +Two layers\.$", capsys.readouterr().out, re.MULTILINE)
    assert np.load(output).shape == (1, 5, 64)


def test_a_bad_file_of_presets_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[mine]\nlayers = 1\n")

    assert main(["serve", "--presets", str(file)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "my.toml: mine: layers is 1" in line


def test_inspect_says_what_a_checkpoint_is_and_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo"]) == 0

    printed = capsys.readouterr().out
    for word in ("random", "fingerprint", "num_hidden_layers", "bfloat16", "float32", "z-image", "2560"):
        assert word in printed


def test_inspect_names_the_loras_that_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = write_checkpoint(tmp_path / "base")
    file = write_lora(tmp_path / "style.safetensors", kohya(make_pairs(weights)))

    assert main(["inspect", str(tmp_path / "base"), "--lora", f"{file}:0.5"]) == 0

    assert re.search(r"^loras +.*style.safetensors × 0.5 in 6 weights$", capsys.readouterr().out, re.MULTILINE)


def test_inspect_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_convert_writes_a_checkpoint_that_encode_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "demo", str(tmp_path / "demo-8"), "--quantize", "mxfp8"]) == 0
    assert main(["inspect", str(tmp_path / "demo-8")]) == 0

    assert re.search(r"^quantization +mxfp8$", capsys.readouterr().out, re.MULTILINE)
    assert main(["encode", "a", "-o", str(tmp_path / "a.npy"), "--model", str(tmp_path / "demo-8")]) == 0


def test_encode_loads_no_more_layers_than_the_preset_needs(tmp_path: Path) -> None:
    """27 of 36 for FLUX.2 klein, whose output is the same with all of them."""
    for name, options in {"some": [], "all": ["--num-layers", "36"]}.items():
        assert main(["encode", "a", "--preset", "flux2-klein", "-o", str(tmp_path / f"{name}.npy"), *options]) == 0

    np.testing.assert_array_equal(np.load(tmp_path / "some.npy"), np.load(tmp_path / "all.npy"))
