"""Every pipeline of diffusers that the client knows paints the same from the service's embeds as from its own encoder.

Tiny denoisers with random weights, around one Qwen3-VL that the service and the pipelines share, and Qwen3's tokenizer.
"""

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.client import AsyncClient, Client
from app.pipelines.adapters import ADAPTERS
from tests.conftest import RunningServer, run_server
from tests.parity import tiny_pipelines as tiny
from tests.parity.tiny_pipelines import Components, Text, diffusers, random_components, torch, write_checkpoint
from tests.reference import relative_error

pytestmark = pytest.mark.parity

PROMPT = "a red fox in deep snow"
OTHER = "a blue boat"
NEGATIVE = "blurry, low quality"
CLOSE = 1e-4  # embeds: both sides round in float32, in another order

needs_ftfy = pytest.mark.skipif(find_spec("ftfy") is None, reason="needs ftfy, with which PRX Pixel cleans its prompts")
# The VAE of ACE-Step is built with a function that PyTorch has deprecated.
ignore_weight_norm = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


@pytest.fixture(scope="module")
def folder(qwen3_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint."""
    folder = tmp_path_factory.mktemp("qwen3-vl")
    write_checkpoint(folder, qwen3_tokenizer)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    """The checkpoint as the pipelines load it."""
    return Text(folder)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[RunningServer]:
    """The checkpoint as the service loads it."""
    with run_server(model=str(folder), compute_dtype="float32") as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="module")
def client(service: RunningServer) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture(autouse=True)
def _small_joyimage(monkeypatch: pytest.MonkeyPatch) -> None:
    """JoyImage paints no less than a million pixels, whatever it is asked for."""
    monkeypatch.setattr("diffusers.pipelines.joyimage.image_processor.find_best_bucket", lambda *_, **__: (32, 32))


@dataclass(frozen=True)
class Case:
    """A pipeline, and a call of it.

    Attributes:
        pipeline: its class; of a modular pipeline, its blocks.
        components: what it is built of.
        call: the arguments beside prompts.
        negative: whether it takes a negative prompt.
        kept: of the text half, by a pipeline that cannot be built without.
        removed: blocks that would rewrite the prompt with a language model.
    """

    pipeline: str
    components: Callable[[Text], Components]
    call: dict[str, Any]
    negative: bool = True
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def arguments(self) -> dict[str, Any]:
        return {"prompt": PROMPT} | ({"negative_prompt": NEGATIVE} if self.negative else {}) | self.call

    def build(self, components: Components) -> Any:
        return quiet(getattr(diffusers, self.pipeline)(**components))

    def build_without_text(self, components: Components) -> Any:
        names = {"text_encoder", "tokenizer", "processor"} & components.keys() - set(self.kept)
        return self.build(components | dict.fromkeys(names))

    def build_modular(self, components: Components, *removed: str) -> Any:
        blocks = getattr(diffusers, self.pipeline)()
        for name in (*self.removed, *removed):
            blocks.sub_blocks.pop(name)
        pipe = blocks.init_pipeline()
        pipe.update_components(**{name: components[name] for name in components.keys() & pipe.components.keys()})
        return quiet(pipe)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size(pixels: int, **more: Any) -> dict[str, Any]:
    return {"height": pixels, "width": pixels, "num_inference_steps": 2, "output_type": "np"} | more


def paint(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Pixels, or the latents of a sound."""
    output = pipe(**arguments, generator=torch.manual_seed(0))
    return np.asarray(output.audios if "audios" in output else output.images)


def paint_modular(pipe: Any, arguments: dict[str, Any]) -> Any:
    return np.asarray(pipe(**arguments, generator=torch.manual_seed(0), output="images"))


def assert_same_picture(ours: Any, whole: Any, other: Any) -> None:
    """Embeds that differ by rounding in float32 change up to 1.3e-4 of what another prompt changes in a picture."""
    change = np.abs(other - whole).max()

    assert change > 1e-3, "the prompt does not matter to this denoiser"
    assert np.abs(ours - whole).max() < 1e-3 * change


MUSIC = {"lyrics": "[verse]\nSoft notes", "audio_duration": 0.4, "bpm": 120, "keyscale": "C major"}
SCHEDULE = {"guidance_schedule": [3.0, 3.0], "max_sequence_length": 64}
TAKE_EMBEDS = [
    pytest.param(Case("Flux2KleinPipeline", tiny.flux2_klein, size(8), negative=False), id="flux2-klein"),
    pytest.param(Case("ZImagePipeline", tiny.z_image, size(32)), id="z-image"),
    pytest.param(Case("ZImageOmniPipeline", tiny.z_image_omni, size(32)), id="z-image-omni"),
    pytest.param(Case("OvisImagePipeline", tiny.ovis_image, size(16)), id="ovis-image"),
    pytest.param(
        Case("PRXPixelPipeline", tiny.prx_pixel, size(32, use_resolution_binning=False)),
        id="prx-pixel",
        marks=needs_ftfy,
    ),
    pytest.param(Case("Krea2Pipeline", tiny.krea_2, size(32)), id="krea-2"),
    pytest.param(Case("NucleusMoEImagePipeline", tiny.nucleus_image, size(32)), id="nucleus-image"),
    pytest.param(
        Case("QwenImage21Pipeline", tiny.qwen_image_2_1, size(32, true_cfg_scale=4.0), kept=("processor",)),
        id="qwen-image-2.1",
    ),
    pytest.param(Case("BriaFibo2Pipeline", tiny.fibo_2, size(8)), id="fibo-2"),
    pytest.param(Case("JoyImageEditPipeline", tiny.joyimage_edit, size(32)), id="joyimage-edit"),
]
PATCHED = [
    pytest.param(Case("Ideogram4Pipeline", tiny.ideogram_4, size(16, **SCHEDULE), negative=False), id="ideogram-4"),
    pytest.param(
        Case(
            "AceStepPipeline",
            tiny.ace_step,
            MUSIC | {"num_inference_steps": 2, "output_type": "latent"},
            negative=False,
        ),
        id="ace-step",
        marks=ignore_weight_norm,
    ),
    pytest.param(Case("DreamLitePipeline", tiny.dreamlite, size(64)), id="dreamlite"),
    pytest.param(Case("DreamLiteMobilePipeline", tiny.dreamlite, size(64), negative=False), id="dreamlite-mobile"),
]
MODULAR = [
    pytest.param(Case("Flux2KleinAutoBlocks", tiny.flux2_klein, size(8), negative=False), id="flux2-klein"),
    pytest.param(Case("Flux2KleinBaseAutoBlocks", tiny.flux2_klein, size(8), negative=False), id="flux2-klein-base"),
    pytest.param(Case("Flux3AutoBlocks", tiny.flux3, size(16), removed=("prompt_upsampler",)), id="flux3"),
    pytest.param(Case("ZImageAutoBlocks", tiny.z_image, size(32)), id="z-image"),
    pytest.param(Case("Krea2AutoBlocks", tiny.krea_2, size(32)), id="krea-2"),
    pytest.param(Case("QwenImage21AutoBlocks", tiny.qwen_image_2_1, size(32)), id="qwen-image-2.1"),
    pytest.param(
        Case(
            "Ideogram4AutoBlocks",
            tiny.ideogram_4,
            size(16, **SCHEDULE),
            negative=False,
            removed=("prompt_upsample",),
        ),
        id="ideogram-4",
    ),
    pytest.param(Case("AnimaAutoBlocks", tiny.anima, size(32)), id="anima"),
]

ONE_PROMPT = ("prx-pixel",)  # with guidance this pipeline itself fails on several


@pytest.mark.parametrize("case", TAKE_EMBEDS)
def test_the_same_picture_from_embeds(client: Client, text: Text, case: Case) -> None:
    """Positive and negative, with a pipeline that has no text encoder."""
    components = random_components(case.components, text)
    pipe, without = case.build(components), case.build_without_text(components)

    whole = paint(pipe, case.arguments)
    other = paint(pipe, case.arguments | {"prompt": OTHER})
    ours = paint(without, client.for_pipeline(without, **case.arguments))

    assert_same_picture(ours, whole, other)


@pytest.mark.parametrize("case", PATCHED)
def test_the_same_picture_from_a_patched_pipeline(client: Client, text: Text, case: Case) -> None:
    """These take no embeds."""
    components = random_components(case.components, text)
    pipe, without = case.build(components), case.build_without_text(components)
    client.patch(without)

    whole = paint(pipe, case.arguments)
    other = paint(pipe, case.arguments | {"prompt": OTHER})
    ours = paint(without, case.arguments)

    assert_same_picture(ours, whole, other)


@pytest.mark.parametrize("case", MODULAR)
def test_the_same_picture_from_a_modular_pipeline(client: Client, text: Text, case: Case) -> None:
    """With the block that encodes text taken out, and Anima's second tokenizer with it."""
    components = random_components(case.components, text)
    pipe, without = case.build_modular(components), case.build_modular(components, "text_encoder")
    beside = {name: components[name] for name in ("t5_tokenizer",) if name in components}

    whole = paint_modular(pipe, case.arguments)
    other = paint_modular(pipe, case.arguments | {"prompt": OTHER})
    ours = paint_modular(without, client.for_pipeline(without, **case.arguments, **beside))

    assert_same_picture(ours, whole, other)


@pytest.mark.parametrize("case", [param for param in TAKE_EMBEDS if param.id not in ONE_PROMPT])
def test_the_same_pictures_from_several_prompts_and_the_default_negative(
    client: Client, text: Text, case: Case
) -> None:
    """The pipeline's own default, which its preset repeats; prompts of other lengths, so that some are padded."""
    components = random_components(case.components, text)
    pipe, without = case.build(components), case.build_without_text(components)
    prompts = [PROMPT, "a fox 🦊 and a family 👨‍👩‍👧 by a lighthouse over a stormy sea, oil on canvas"]

    whole = paint(pipe, {"prompt": list(prompts)} | case.call)
    other = paint(pipe, {"prompt": [OTHER, OTHER]} | case.call)
    ours = paint(without, client.for_pipeline(without, prompts, **case.call))

    assert len(ours) == 2
    assert_same_picture(ours, whole, other)


@pytest.fixture(scope="module")
def klein(text: Text) -> Any:
    return quiet(diffusers.Flux2KleinPipeline(**random_components(tiny.flux2_klein, text)))


@pytest.fixture(scope="module")
def omni(text: Text) -> Any:
    return quiet(diffusers.ZImageOmniPipeline(**random_components(tiny.z_image_omni, text)))


def test_embeds_come_in_the_dtype_of_the_transformer(client: Client, text: Text) -> None:
    """In another one most denoisers fail."""
    pipe = diffusers.ZImagePipeline(**random_components(tiny.z_image, text))
    single = client.for_pipeline(pipe, PROMPT)
    pipe.transformer.to(torch.bfloat16)
    half = client.for_pipeline(pipe, PROMPT)

    [single_rows], [half_rows] = single["prompt_embeds"], half["prompt_embeds"]
    assert (single_rows.dtype, half_rows.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(half_rows, single_rows.bfloat16())


def test_the_async_client_gives_the_same(service: RunningServer, client: Client, klein: Any) -> None:
    async def ask() -> dict[str, Any]:
        async with AsyncClient(service.url) as asynchronous:
            return await asynchronous.for_pipeline(klein, PROMPT, height=8)

    ours, theirs = asyncio.run(ask()), client.for_pipeline(klein, PROMPT, height=8)

    assert ours.keys() == theirs.keys() == {"prompt", "prompt_embeds", "negative_prompt_embeds", "height"}
    assert torch.equal(ours["prompt_embeds"], theirs["prompt_embeds"])


def test_negatives_are_encoded_only_where_they_are_used(client: Client, klein: Any, omni: Any) -> None:
    """Each pipeline has its own threshold, and its own default."""
    assert "negative_prompt_embeds" in client.for_pipeline(klein, PROMPT)
    assert "negative_prompt_embeds" not in client.for_pipeline(klein, PROMPT, guidance_scale=1.0)
    assert "negative_prompt_embeds" in client.for_pipeline(omni, PROMPT, guidance_scale=1.0)
    assert "negative_prompt_embeds" not in client.for_pipeline(omni, PROMPT, guidance_scale=0.0)


def test_a_distilled_klein_uses_no_negatives(client: Client, text: Text) -> None:
    pipe = diffusers.Flux2KleinPipeline(**random_components(tiny.flux2_klein, text), is_distilled=True)

    assert "negative_prompt_embeds" not in client.for_pipeline(pipe, PROMPT)


def test_qwen_image_is_guided_only_by_a_negative_that_is_given(client: Client, text: Text) -> None:
    """Without one the pipeline itself is not guided, whatever the scale."""
    pipe = diffusers.QwenImage21Pipeline(**random_components(tiny.qwen_image_2_1, text))

    assert "negative_prompt_embeds" not in client.for_pipeline(pipe, PROMPT, true_cfg_scale=4.0)
    assert "negative_prompt_embeds" in client.for_pipeline(pipe, PROMPT, "", true_cfg_scale=4.0)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_omni_segments_equal_the_pipelines(client: Client, omni: Any, images: int) -> None:
    """The prompt is cut where images stand, and each segment is encoded by itself."""
    with torch.no_grad():
        theirs, negatives = omni.encode_prompt([PROMPT, OTHER], num_condition_images=images)
    ours = client.for_pipeline(omni, [PROMPT, OTHER], image=["an image"] * images or None)

    for our, their in zip(ours["prompt_embeds"], theirs, strict=True):
        assert [relative_error(a, b) < CLOSE for a, b in zip(our, their, strict=True)] == [True] * len(their)
    for our, their in zip(ours["negative_prompt_embeds"], negatives, strict=True):
        assert [relative_error(a, b) < CLOSE for a, b in zip(our, their, strict=True)] == [True] * len(their)


@needs_ftfy
def test_prx_prompts_are_cleaned_as_the_pipeline_cleans_them(client: Client, text: Text) -> None:
    pipe = diffusers.PRXPixelPipeline(**random_components(tiny.prx_pixel, text))
    prompt = "  a cafÃ© &amp;amp; a â€œfoxâ€\x9d  "
    with torch.no_grad():
        theirs, mask, *_ = pipe.encode_prompt(prompt)
    ours = client.for_pipeline(pipe, prompt)

    assert torch.equal(ours["prompt_attention_mask"], mask)
    assert relative_error(ours["prompt_embeds"][mask], theirs[mask]) < CLOSE


def test_fibo_captions_are_cleaned_as_the_pipeline_cleans_them(client: Client, text: Text) -> None:
    case = Case("BriaFibo2Pipeline", tiny.fibo_2, size(8))
    components = random_components(case.components, text)
    pipe, without = case.build(components), case.build_without_text(components)
    caption = {"short_description": "ein Fuchs, süß", "objects": [], "aesthetics": {"mood": "", "aesthetic_score": 9}}
    prompt = json.dumps(caption, indent=2)

    whole = paint(pipe, {"prompt": prompt} | case.call)
    other = paint(pipe, {"prompt": OTHER} | case.call)
    ours = paint(without, client.for_pipeline(without, prompt, **case.call))

    assert_same_picture(ours, whole, other)


def test_the_window_of_a_call_is_the_pipelines(client: Client, text: Text) -> None:
    """`max_sequence_length` counts the rows that are delivered, not those that are dropped."""
    case = Case("OvisImagePipeline", tiny.ovis_image, size(16, max_sequence_length=32))
    components = random_components(case.components, text)
    pipe = case.build(components)
    with torch.no_grad():
        theirs, *_ = pipe.encode_prompt("a red fox " * 30, do_classifier_free_guidance=False, max_sequence_length=32)
    ours = client.for_pipeline(pipe, "a red fox " * 30, max_sequence_length=32)

    assert ours["prompt_embeds"].shape[1] == 32
    assert relative_error(ours["prompt_embeds"], theirs) < CLOSE


def test_another_preset_may_be_asked_for(client: Client, klein: Any) -> None:
    """As Ollama encodes it."""
    arguments = client.for_pipeline(klein, PROMPT, preset="ollama/flux2-klein")

    assert not torch.equal(arguments["prompt_embeds"], client.for_pipeline(klein, PROMPT)["prompt_embeds"])


@pytest.mark.parametrize("name", [name for name in ADAPTERS if hasattr(getattr(diffusers, name), "check_inputs")])
def test_every_pipeline_has_the_arguments_that_it_is_given(name: str) -> None:
    """Those of one family that no picture is painted with, too: image to image, inpainting, ControlNet."""
    parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
    adapter = ADAPTERS[name]
    positive = {adapter.embeds, *([adapter.mask] if adapter.mask else [])}
    negative = {f"negative_{argument}" for argument in positive} if "guidance_scale" in parameters else set()

    assert positive | negative | adapter.constant.keys() <= parameters.keys()


def test_minimax_h3_gets_a_tag_for_each_row(client: Client) -> None:
    """Its encoder has to be deeper than the one here, so another preset stands in for its own."""
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        ffn_dim=16,
        text_dim=tiny.D,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=4,
    )
    blocks = diffusers.MiniMaxH3Blocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=transformer)
    arguments = client.for_pipeline(pipe, PROMPT, preset="last-hidden-state", num_frames=1)

    rows = arguments["prompt_embeds"].shape[1]
    assert arguments.keys() == {"prompt_embeds", "text_token_tags", "num_frames"}
    assert arguments["text_token_tags"].tolist() == [pipe.text_tag] * rows


def test_images_that_the_text_encoder_would_see_are_refused(client: Client, text: Text) -> None:
    """The service has no vision tower, and text alone would paint something else."""
    pipe = diffusers.JoyImageEditPipeline(**random_components(tiny.joyimage_edit, text))

    with pytest.raises(ValueError, match="image: the text encoder of JoyImageEditPipeline looks at it"):
        client.for_pipeline(pipe, PROMPT, image=object())


def test_unknown_pipelines_are_refused(client: Client) -> None:
    with pytest.raises(TypeError, match=r"object does not take embeds.* Flux2KleinPipeline"):
        client.for_pipeline(object(), PROMPT)
    with pytest.raises(TypeError, match=r"object cannot be patched.* Ideogram4Pipeline"):
        client.patch(object())
