"""The scripts for diffusers, with tiny pipelines saved as folders: the files that they are pointed at in earnest."""

import runpy
import wave
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import RunningServer, run_server
from tests.parity import tiny_pipelines as tiny
from tests.parity.conftest import fetch_tokenizer
from tests.parity.tiny_pipelines import Text, diffusers, random_components, torch, write_checkpoint

pytestmark = pytest.mark.parity

SCRIPTS = Path(__file__).parents[2] / "examples" / "diffusers"
PROMPT = "a red fox in deep snow"
Script = Callable[..., Path]
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate, by which it is loaded")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder of all pipelines here."""
    folder, tokenizer = tmp_path_factory.mktemp("qwen3-vl"), tmp_path_factory.mktemp("tokenizer")
    fetch_tokenizer(tokenizer)
    write_checkpoint(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> Text:
    return Text(checkpoint)


@pytest.fixture(scope="module")
def service(checkpoint: Path) -> Iterator[RunningServer]:
    with run_server(model=str(checkpoint), compute_dtype="float32") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def script(service: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs a script on a saved pipeline, on the CPU, and returns the file that it wrote."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def script(name: str, model: Path, size: int, *more: str, **options: Any) -> Path:
        output = tmp_path / "output"
        path = output.with_suffix(".wav" if name == "ace_step.py" else ".png")
        arguments = [PROMPT, "--model", str(model), "--server", service.url, "--output", str(path), "--steps", "2"]
        arguments += ["--size", str(size), "--device", "cpu", "--dtype", "float32", *more]
        runpy.run_path(str(SCRIPTS / name))["main"](arguments, **options)
        return path

    return script


def without_text(components: dict[str, Any]) -> dict[str, Any]:
    """The tiny processor is none of transformers' classes, and cannot be saved."""
    return components | {name: None for name in ("text_encoder", "tokenizer", "processor") if name in components}


def pixels(path: Path) -> Any:
    from PIL import Image

    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    ("name", "pipeline", "components", "size"),
    [
        pytest.param("flux2_klein.py", "Flux2KleinPipeline", tiny.flux2_klein, 8, id="flux2-klein"),
        pytest.param("z_image.py", "ZImagePipeline", tiny.z_image, 32, id="z-image"),
        pytest.param("takes_embeds.py", "Krea2Pipeline", tiny.krea_2, 32, id="krea-2", marks=needs_accelerate),
        pytest.param("takes_embeds.py", "OvisImagePipeline", tiny.ovis_image, 16, id="ovis-image"),
    ],
)
def test_a_script_paints_what_the_whole_pipeline_paints(
    script: Script, text: Text, tmp_path: Path, name: str, pipeline: str, components: Any, size: int
) -> None:
    """The saved pipeline has its text encoder, which the script leaves out."""
    pipe = getattr(diffusers, pipeline)(**random_components(components, text))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    call = {"height": size, "width": size, "num_inference_steps": 2}
    [whole] = pipe(prompt=PROMPT, **call, generator=torch.Generator("cpu").manual_seed(0)).images

    painted = pixels(script(name, tmp_path / "pipeline", size))

    assert painted.std() > 0
    assert np.abs(painted - np.asarray(whole).astype(int)).max() <= 1  # of 255: one rounding


@pytest.mark.parametrize(
    ("pipeline", "components", "size"),
    [
        pytest.param("NucleusMoEImagePipeline", tiny.nucleus_image, 32, id="nucleus-image"),
        pytest.param("BriaFibo2Pipeline", tiny.fibo_2, 8, id="fibo-2"),
    ],
)
def test_other_pipelines_that_take_embeds_paint(
    script: Script, text: Text, tmp_path: Path, pipeline: str, components: Any, size: int
) -> None:
    """Their class stands in their checkpoint."""
    getattr(diffusers, pipeline)(**without_text(random_components(components, text))).save_pretrained(
        tmp_path / "pipeline"
    )

    assert pixels(script("takes_embeds.py", tmp_path / "pipeline", size, "--negative", "blurry")).std() > 0


@pytest.mark.parametrize(
    ("pipeline", "components", "size", "more"),
    [
        pytest.param("Ideogram4Pipeline", tiny.ideogram_4, 16, ["--guidance", "3"], id="ideogram-4"),
        pytest.param("DreamLitePipeline", tiny.dreamlite, 64, ["--negative", "blurry"], id="dreamlite"),
    ],
)
def test_patched_pipelines_paint(
    script: Script, text: Text, tmp_path: Path, pipeline: str, components: Any, size: int, more: list[str]
) -> None:
    getattr(diffusers, pipeline)(**without_text(random_components(components, text))).save_pretrained(
        tmp_path / "pipeline"
    )

    assert pixels(script("patched.py", tmp_path / "pipeline", size, *more)).std() > 0


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # with which the VAE of ACE-Step is built
def test_ace_step_writes_a_sound(script: Script, text: Text, tmp_path: Path) -> None:
    components = without_text(random_components(tiny.ace_step, text))
    diffusers.AceStepPipeline(**components).save_pretrained(tmp_path / "pipeline")

    with wave.open(str(script("ace_step.py", tmp_path / "pipeline", 0, seconds=4.0))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 4)
        assert file.getnframes() > 0


@needs_accelerate
def test_flux3_paints_from_a_modular_pipeline(script: Script, text: Text, tmp_path: Path) -> None:
    """The saved pipeline has all blocks; the script takes two out."""
    components = random_components(tiny.flux3, text)
    blocks = diffusers.Flux3AutoBlocks()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(**{name: components[name] for name in components.keys() & pipe.components.keys()})
    pipe.save_pretrained(str(tmp_path / "pipeline"), overwrite_modular_index=True)

    assert pixels(script("flux3.py", tmp_path / "pipeline", 16)).std() > 0
