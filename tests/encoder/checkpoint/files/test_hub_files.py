"""Fetching from a hub, with the real client in its own process and a small hub on loopback.

A process of its own, because huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE once, when it is imported.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from encoder.checkpoint import open_checkpoint
from encoder.checkpoint.files import transfer_log
from encoder.options import Lora, ModelOptions
from tests.checkpoints import write_checkpoint, write_json, write_pipeline
from tests.encoder.checkpoint.hub_server import COMMIT, PUSHED_COMMIT, HubServer, running_hub
from tests.encoder.checkpoint.lora_files import make_pairs, peft, write_peft
from tests.encoder.checkpoint.socks_proxy import running_proxy

OPEN = """
import json, os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
from encoder.checkpoint import open_checkpoint
from encoder.errors import CheckpointError
from encoder.options import Lora, ModelOptions
cache_dir, *sources = sys.argv[1:]
loras = tuple(map(Lora.parse, filter(None, os.environ.get("LORAS", "").split(","))))
if "FREE_BYTES" in os.environ:
    shutil.disk_usage = lambda folder: SimpleNamespace(free=int(os.environ["FREE_BYTES"]))
for source in sources:
    source, _, revision = source.partition(" ")
    try:
        checkpoint = open_checkpoint(ModelOptions(source, revision or None, Path(cache_dir), loras=loras))
        opened = {"name": checkpoint.name, "revision": checkpoint.revision, "fingerprint": checkpoint.fingerprint}
    except CheckpointError as error:
        opened = {"error": str(error)}
    print(json.dumps(opened))
"""

Open = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The folder that the hub serves as org/model: a checkpoint, and what else a repository holds."""
    folder = tmp_path / "repository"
    write_checkpoint(folder, shards=2, hidden_size=128, intermediate_size=512)
    (folder / "README.md").write_text("# A model")
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "consolidated.safetensors").write_bytes(b"the same again")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[HubServer]:
    with running_hub(repository) as server:
        yield server


@pytest.fixture
def open_on_hub(hub: HubServer, tmp_path: Path) -> Open:
    """Opens checkpoints in a process whose hub is the one on loopback; a source may be followed by a revision."""

    def open_on_hub(*sources: str, **environment: str) -> list[dict[str, Any]]:
        hub.fetched.clear()
        command = [sys.executable, "-c", OPEN, str(tmp_path / "cache"), *sources]
        without_ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**without_ours, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), **environment}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return [json.loads(line) for line in output.splitlines()]

    return open_on_hub


def test_only_the_files_needed_are_fetched_and_none_twice(hub: HubServer, open_on_hub: Open, repository: Path) -> None:
    """A repository may hold the weights several times over."""
    opened, again = open_on_hub("org/model", "org/model")

    assert sorted(hub.fetched) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert opened == {
        "name": "org/model",
        "revision": COMMIT,
        "fingerprint": open_checkpoint(ModelOptions(str(repository))).fingerprint,
    }
    assert again == opened


def test_a_slow_tokenizers_files_are_fetched_where_there_is_no_other(
    hub: HubServer, open_on_hub: Open, repository: Path
) -> None:
    """Most repositories have them beside tokenizer.json, where nobody needs them."""
    vocabulary = json.loads(hub.files["tokenizer.json"])["model"]["vocab"]
    hub.files |= {"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": b"#version: 0.2\n"}
    del hub.files["tokenizer.json"]

    opened, again = open_on_hub("org/model", "org/model")

    assert opened == again and opened["revision"] == COMMIT
    assert {"vocab.json", "merges.txt"} < set(hub.fetched)
    assert len(hub.fetched) == len(set(hub.fetched))


def serve_lora(hub: HubServer, folder: Path, name: str = "adapter_model.safetensors") -> Path:
    """Let the hub serve a LoRA in place of the checkpoint, for a model that is written to `base`. Its file here."""
    pairs = make_pairs(write_checkpoint(folder / "base"))
    write_peft(folder / "lora", peft(pairs))
    (folder / "lora" / "adapter_model.safetensors").rename(folder / "lora" / name)
    hub.files = {file.name: file.read_bytes() for file in (folder / "lora").iterdir()}
    hub.files["optimizer.pt"] = b"never read"
    return folder / "lora" / name


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "style.safetensors"])
def test_lora_is_fetched_with_the_config_beside_it(
    tmp_path: Path, hub: HubServer, open_on_hub: Open, name: str
) -> None:
    file = serve_lora(hub, tmp_path, name)
    source = "org/model" if name == "adapter_model.safetensors" else f"org/model/{name}"

    opened = open_on_hub(str(tmp_path / "base"), LORAS=f"{source}@main:0.5")

    options = ModelOptions(str(tmp_path / "base"), loras=(Lora(str(file), 0.5),))
    assert [found["fingerprint"] for found in opened] == [open_checkpoint(options).fingerprint]
    assert sorted(hub.fetched) == ["adapter_config.json", name]


def test_repository_without_the_lora_is_named(tmp_path: Path, hub: HubServer, open_on_hub: Open) -> None:
    serve_lora(hub, tmp_path, "style.safetensors")

    [whole] = open_on_hub(str(tmp_path / "base"), LORAS="org/model/other.safetensors")

    assert whole["error"].startswith("org/model/other.safetensors: has no other.safetensors. Name a file")


def test_repository_of_a_lora_is_no_model(tmp_path: Path, hub: HubServer, open_on_hub: Open) -> None:
    serve_lora(hub, tmp_path)

    [opened] = open_on_hub("org/model")

    assert "is a LoRA and no model" in opened["error"]
    assert opened["error"].endswith("--model Qwen/Qwen3-4B --lora org/model")
    assert hub.fetched == ["adapter_config.json"]


def test_shard_without_a_tensor_of_the_encoder_is_not_fetched(
    hub: HubServer, open_on_hub: Open, repository: Path
) -> None:
    """A vision tower is a gigabyte."""
    index = json.loads((repository / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.visual.merger.norm.weight"] = "vision.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files["vision.safetensors"] = b"never read"

    [opened] = open_on_hub("org/model")

    assert opened["revision"] == COMMIT
    assert "vision.safetensors" not in hub.fetched


def test_pipeline_gives_its_text_encoder_alone(tmp_path: Path, hub: HubServer, open_on_hub: Open) -> None:
    """The transformer of a pipeline is several times as large."""
    write_pipeline(tmp_path / "pipeline")
    hub.files = {
        str(file.relative_to(tmp_path / "pipeline")): file.read_bytes()
        for file in (tmp_path / "pipeline").rglob("*")
        if file.is_file()
    }
    hub.files["transformer/diffusion_pytorch_model.safetensors"] = b"large"
    hub.files["model.safetensors"] = b"a single file of it all"

    [opened] = open_on_hub("org/model")

    assert opened["revision"] == COMMIT
    assert sorted(hub.fetched) == [
        "model_index.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]


def test_cached_checkpoint_opens_offline(hub: HubServer, open_on_hub: Open) -> None:
    """By setting, and when the network is down."""
    opened = open_on_hub("org/model")

    assert open_on_hub("org/model", HF_HUB_OFFLINE="1") == opened
    assert open_on_hub("org/model", HF_ENDPOINT="http://127.0.0.1:9") == opened  # the discard port: nobody listens
    assert hub.fetched == []


def test_empty_variables_of_the_hubs_client_mean_not_set(tmp_path: Path) -> None:
    """Compose writes `${HF_HOME:-}`, for which huggingface_hub alone would cache in the working folder."""
    script = "import encoder; from huggingface_hub import constants; print(constants.HF_HUB_CACHE, constants.ENDPOINT)"
    empty = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "XDG_CACHE_HOME"), "")
    environment = {**os.environ, "HOME": str(tmp_path), **empty}
    output = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)

    assert output.stdout == f"{tmp_path}/.cache/huggingface/hub https://huggingface.co\n"


def test_revision_can_be_pinned(open_on_hub: Open) -> None:
    """In the id or as an argument, by tag or by commit."""
    *pinned, contradiction = open_on_hub(
        "org/model@v1", "org/model v1", f"org/model@{COMMIT} {COMMIT}", "org/model@main v1"
    )

    assert [opened["revision"] for opened in pinned] == [COMMIT] * 3
    assert "names one revision and 'v1' is another" in contradiction["error"]


def test_interrupted_transfer_is_reported_and_resumed_by_the_next_start(hub: HubServer, open_on_hub: Open) -> None:
    """The client retries a few times by itself."""
    hub.cut_off = 1000
    [broken] = open_on_hub("org/model")
    hub.cut_off = 0
    [resumed] = open_on_hub("org/model")

    assert "fetching it failed, start again to resume" in broken["error"]
    assert resumed["revision"] == COMMIT


def test_unknown_names_are_told_apart(hub: HubServer, open_on_hub: Open) -> None:
    """Each has another remedy."""
    hub.gated = True
    repository, revision, gated = open_on_hub("org/nothing", "org/model@v2", "org/model")

    assert "org/nothing: neither a folder here nor a repository" in repository["error"]
    assert "org/model: has no revision 'v2'" in revision["error"]
    assert "org/model: is gated. Accept its terms" in gated["error"]


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"HF_HUB_OFFLINE": "1"}, id="offline-by-setting"),
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, id="hub-unreachable"),
    ],
)
def test_checkpoint_that_is_not_cached_cannot_be_had_offline(open_on_hub: Open, environment: dict[str, str]) -> None:
    """The message names both ways out."""
    [opened] = open_on_hub("org/model", **environment)

    assert "not complete in the cache, and the hub cannot be reached" in opened["error"]
    assert "\n" not in opened["error"]


def test_hub_is_reached_through_a_socks_proxy(hub: HubServer, open_on_hub: Open) -> None:
    """It is in the environment where people have a tunnel."""
    with running_proxy() as proxy:
        [opened] = open_on_hub("org/model", ALL_PROXY=proxy.url, NO_PROXY="", no_proxy="")

    assert opened["revision"] == COMMIT
    assert set(proxy.connected) == {hub.server_address[1]}


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "no address", "http://host:port"])
def test_proxy_that_cannot_be_used_is_one_line_naming_its_variable(open_on_hub: Open, proxy: str) -> None:
    """Desktops write `socks://`. The value may hold a password."""
    [opened] = open_on_hub("org/model", ALL_PROXY=proxy, NO_PROXY="", no_proxy="")

    assert "ALL_PROXY must be like http://host:port or socks5://host:port." in opened["error"]
    assert "\n" not in opened["error"]


def test_address_of_a_hub_that_cannot_be_used_is_one_line(open_on_hub: Open) -> None:
    [opened] = open_on_hub("org/model", HF_ENDPOINT="hf-mirror.com")

    assert "HF_ENDPOINT must be like https://host." in opened["error"]
    assert "\n" not in opened["error"]


def test_empty_proxy_is_none(open_on_hub: Open) -> None:
    [opened] = open_on_hub("org/model", ALL_PROXY=" ", HTTP_PROXY="", http_proxy=" ")

    assert opened["revision"] == COMMIT


def test_hostile_index_leads_nowhere(hub: HubServer, open_on_hub: Open, tmp_path: Path) -> None:
    """The names in it become names of files to fetch."""
    write_json(tmp_path / "index.json", {"weight_map": {"model.norm.weight": "../../../evil.safetensors"}})
    hub.files["model.safetensors.index.json"] = (tmp_path / "index.json").read_bytes()
    [opened] = open_on_hub("org/model")

    assert "expected the name of a file beside it" in opened["error"]
    assert not any("evil" in path for path in hub.fetched)


def test_repository_without_safetensors_is_refused(hub: HubServer, open_on_hub: Open) -> None:
    """Pickled weights are not even fetched."""
    hub.files = {name: content for name, content in hub.files.items() if "safetensors" not in name}
    [opened] = open_on_hub("org/model")

    assert "no *.safetensors file" in opened["error"]
    assert "pytorch_model.bin" not in hub.fetched


def test_repository_of_single_files_asks_for_one_of_them(hub: HubServer, open_on_hub: Open) -> None:
    """Of a model in parts the first is enough."""
    names = ["q4.gguf", "q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf", "text_encoders/a.safetensors"]
    hub.files = dict.fromkeys(names, b"large")
    [opened] = open_on_hub("org/model")

    assert opened["error"].endswith(
        "has no model.safetensors. Name one of its files: "
        "org/model/q4.gguf, org/model/q8-00001-of-00002.gguf, org/model/text_encoders/a.safetensors."
    )
    assert not set(names) & set(hub.fetched)


def test_all_parts_of_a_gguf_model_are_fetched(hub: HubServer, open_on_hub: Open) -> None:
    """From a repository with nothing else, as they often are."""
    names = ["q4.gguf", "q8-00001-of-00002.gguf", "q8-00002-of-00002.gguf"]
    hub.files = {name: name.encode() for name in names}
    open_on_hub("org/model/q8-00001-of-00002.gguf")

    assert sorted(hub.fetched) == names[1:]


def test_subfolder_and_single_file_of_a_repository_are_fetched(
    tmp_path: Path, hub: HubServer, open_on_hub: Open
) -> None:
    """Repositories hold several models, and ComfyUI's hold files."""
    weights = write_checkpoint(tmp_path / "sub" / "model")
    folder = tmp_path / "sub" / "model"
    for file in folder.iterdir():
        hub.files[f"inner/deep/{file.name}"] = file.read_bytes()
    hub.files["split_files/text_encoders/qwen_3_4b.safetensors"] = (folder / "model.safetensors").read_bytes()
    hub.files["split_files/text_encoders/tokenizer.json"] = (folder / "tokenizer.json").read_bytes()
    hub.files["split_files/text_encoders/other.safetensors"] = b"another"
    subfolder, single, nothing = open_on_hub(
        "org/model/inner/deep@v1", "org/model/split_files/text_encoders/qwen_3_4b.safetensors", "org/model/no/such.gguf"
    )

    assert subfolder["fingerprint"] == single["fingerprint"] == open_checkpoint(ModelOptions(str(folder))).fingerprint
    assert subfolder["name"] == "org/model/inner/deep@v1"
    assert single["revision"] == COMMIT
    assert "split_files/text_encoders/other.safetensors" not in hub.fetched
    assert "org/model/no/such.gguf: has no such file" in nothing["error"]
    assert len(weights) == 24


def test_mirror_that_does_not_list_sizes_is_enough(hub: HubServer, open_on_hub: Open, repository: Path) -> None:
    """It serves /resolve and the names of the files. Free space cannot be checked then."""
    hub.has_tree = False
    [opened] = open_on_hub("org/model", FREE_BYTES="0")

    assert opened["fingerprint"] == open_checkpoint(ModelOptions(str(repository))).fingerprint


def test_mirror_that_does_not_list_sizes_still_asks_for_one_of_its_files(hub: HubServer, open_on_hub: Open) -> None:
    hub.has_tree = False
    hub.files = dict.fromkeys(["q4.gguf", "q8.gguf"], b"large")
    [opened] = open_on_hub("org/model")

    assert opened["error"].endswith(
        "has no model.safetensors. Name one of its files: org/model/q4.gguf, org/model/q8.gguf."
    )


def test_address_of_a_model_is_taken_as_its_id(hub: HubServer, open_on_hub: Open) -> None:
    """People copy it from their browser."""
    *opened, elsewhere = open_on_hub(
        f"{hub.url}/org/model",
        f"{hub.url}/org/model/tree/v1",
        f"{hub.url}/org/model/resolve/main/model-00001-of-00002.safetensors?download=true",
        "https://user:token@example.com/org/model",
    )

    assert [checkpoint.get("revision") for checkpoint in opened[:2]] == [COMMIT] * 2
    assert "model-00001-of-00002.safetensors" in hub.fetched
    assert "'https://example.com/org/model': is an address, but not of a model on the hub" in elsewhere["error"]


def test_push_during_a_download_does_not_mix_two_revisions(
    hub: HubServer, open_on_hub: Open, repository: Path, tmp_path: Path
) -> None:
    """The config and the index come first, the weights after them: all must be of the commit that was there first."""
    first = open_checkpoint(ModelOptions(str(repository))).fingerprint
    write_checkpoint(tmp_path / "other", seed=1, shards=2, hidden_size=128, intermediate_size=512)
    pushed = {file.name: file.read_bytes() for file in (tmp_path / "other").iterdir()}
    hub.push_after = ("model.safetensors.index.json", pushed)
    during, after = open_on_hub("org/model", "org/model")

    assert (during["revision"], during["fingerprint"]) == (COMMIT, first)
    assert after["revision"] == PUSHED_COMMIT
    assert after["fingerprint"] != first


@pytest.mark.parametrize("lacking", [0, 1])
def test_disk_that_is_too_small_is_found_before_the_transfer(
    hub: HubServer, open_on_hub: Open, repository: Path, lacking: int
) -> None:
    """A full disk fails other services too. Only the files that are fetched count."""
    needed = sum(file.stat().st_size for file in repository.glob("model-*.safetensors"))
    [opened] = open_on_hub("org/model", FREE_BYTES=str(needed - lacking))

    assert bool(lacking) == ("GB must be fetched, and 0.0 GB are free in" in opened.get("error", ""))
    assert bool(lacking) != any(path.startswith("model-") for path in hub.fetched)


def test_transfer_is_logged_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container nobody sees a progress bar."""
    monkeypatch.setattr(transfer_log, "EVERY_S", 0.05)
    caplog.set_level("INFO")
    with transfer_log.log_transfer("org/model", tmp_path, 4_000_000):
        (tmp_path / "blob.incomplete").write_bytes(bytes(range(256)) * 4000)
        time.sleep(0.5)

    assert "org/model: fetching 4 MB" in caplog.text
    assert re.search(r"org/model: 1 of 4 MB, [\d.]+ MB/s, \d+ s left", caplog.text)
