"""Checkpoints as deep as the real ones and very narrow, around Qwen3's real tokenizer, for the pipelines and for us."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from encoder import TextEncoder
from encoder.options import ModelOptions
from tests.parity.conftest import TOKENIZER_FILES
from tests.parity.random_weights import randomize

# What Qwen3-VL's chat template makes of messages that hold text alone; it takes strings and lists of parts.
QWEN3_VL_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}{{- part.text }}{%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


@pytest.fixture(scope="session", autouse=True)
def torch_as_in_a_pipeline() -> Iterator[None]:
    """As `__call__` does it, without gradients; and on one thread, since narrow layers are ten times slower on two."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def qwen3(qwen3_folder: Path) -> TextEncoder:
    """Ours, of 28 layers as in Qwen3-0.6B and 1.7B."""
    return TextEncoder.open(ModelOptions(str(qwen3_folder), compute_dtype="float32"))


@pytest.fixture(scope="session")
def qwen3_model(qwen3_folder: Path) -> Any:
    """The same as transformers' Qwen3Model."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
    return transformers.AutoModel.from_pretrained(qwen3_folder).float().eval()


@pytest.fixture(scope="session")
def qwen3_tokenizer_of_transformers(qwen3_folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
    return transformers.AutoTokenizer.from_pretrained(qwen3_folder)


def save_qwen3_vl(folder: Path, num_hidden_layers: int, tokenizer: Path) -> Any:
    """Write a Qwen3VLForConditionalGeneration, vision tower included, and return it."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: make test-parity")
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"num_hidden_layers": num_hidden_layers}, vision_config=VISION, tie_word_embeddings=True
    )
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    randomize(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(0.125)  # each layer adds a little, as GPT-2 begins; else 36 of them blow rounding up tenfold
    model.save_pretrained(folder)
    model.lm_head = torch.nn.Identity()  # nobody reads the logits, of which there would be 311 MB per 512 tokens
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": QWEN3_VL_TEMPLATE}))
    return model


@pytest.fixture(scope="session")
def qwen3_vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen3-vl")


@pytest.fixture(scope="session")
def qwen3_vl_model(qwen3_vl_folder: Path, qwen3_tokenizer: Path) -> Any:
    """A Qwen3VLForConditionalGeneration of 36 layers, as Qwen3-VL-4B and 8B have."""
    return save_qwen3_vl(qwen3_vl_folder, 36, qwen3_tokenizer)


@pytest.fixture(scope="session")
def qwen3_vl(qwen3_vl_folder: Path, qwen3_vl_model: Any) -> TextEncoder:
    """The same as ours."""
    return TextEncoder.open(ModelOptions(str(qwen3_vl_folder), compute_dtype="float32"))


@pytest.fixture(scope="session")
def qwen3_vl_tokenizer(qwen3_vl_folder: Path, qwen3_vl_model: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
    return transformers.AutoTokenizer.from_pretrained(qwen3_vl_folder)


@pytest.fixture(scope="session")
def qwen3_vl_processor(qwen3_vl_tokenizer: Any) -> Any:
    """Qwen3VLProcessor without its processor of videos, which needs torchvision."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")

    class TextProcessor(transformers.Qwen3VLProcessor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    return TextProcessor(tokenizer=qwen3_vl_tokenizer, chat_template=QWEN3_VL_TEMPLATE)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Builds a pipeline of diffusers from the components given; the others are None, as for text alone."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: make test-parity")

    def build(name: str, **components: Any) -> Any:
        pipeline_class = getattr(diffusers, name)
        parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
        absent = {p.name: None for p in parameters if p.default is p.empty and p.name not in components}
        return pipeline_class(**absent, **components)

    return build
