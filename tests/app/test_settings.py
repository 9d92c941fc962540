"""Settings and command line flags are one and the same list."""

from pathlib import Path

import pytest

from app.cli import main, make_parser
from app.settings import KEYS, Settings, SettingsError, flag, load_settings, variable
from encoder import Lora

ROOT = Path(__file__).parents[2]
VALUES = {
    "model": "m",
    "revision": "main",
    "tokenizer": "t",
    "lora": "style.safetensors:0.8,other",
    "quantize": "8",
    "compute_dtype": "float32",
    "cache_dir": "/tmp",
    "disk_cache_dir": "/tmp",
    "presets": str(ROOT / "examples" / "presets.toml"),
    "only_presets": "z-image,last-hidden-state",
    "default_preset": "z-image",
    "predict_preset": "z-image",
    "host": "::1",
    "uds": "/tmp/s",
    "api_key": "k",
    "allowed_hosts": "a,b",
    "allowed_origins": "http://a,https://b:1",
    "log_level": "error",
    "log_format": "json",
}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_a_flag_and_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = VALUES.get(name, "7")
    is_switch = Settings.model_fields[name].annotation is bool
    arguments = [flag(name)] if is_switch else [flag(name), value]
    given = vars(make_parser().parse_args(["serve", *arguments]))
    del given["command"]

    by_flag = load_settings(given)
    monkeypatch.setenv(variable(name), "true" if is_switch else value)
    by_variable = load_settings({})

    assert getattr(by_flag, name) == getattr(by_variable, name) != Settings.model_fields[name].default


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3_ENCODER_PORT", "1")

    assert load_settings({"port": "2"}).port == 2


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name not in KEYS])
def test_an_empty_value_is_as_if_it_were_not_given(name: str, empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose writes `${X:-}` as an empty variable, and a script passes an empty one of its own on."""
    if Settings.model_fields[name].annotation is not bool:  # a switch takes no value
        given = vars(make_parser().parse_args(["serve", flag(name), empty]))
        assert load_settings({name: given[name]}) == load_settings({})
        monkeypatch.setenv(variable(name), VALUES.get(name, "7"))
        assert load_settings({name: given[name]}) == load_settings({})
    monkeypatch.setenv(variable(name), empty)

    assert getattr(load_settings({}), name) == getattr(Settings(), name) == Settings.model_fields[name].default


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_key_is_refused(
    empty: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service that should ask for a key must not start without one."""
    assert main(["serve", "--api-key", empty]) == 2
    monkeypatch.setenv("QWEN3_ENCODER_API_KEY", empty)
    assert main(["serve"]) == 2

    for line in capsys.readouterr().err.splitlines():
        assert "QWEN3_ENCODER_API_KEY: is set and empty, expected a key." in line


def test_a_misspelt_variable_is_named_with_the_setting_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Variables of the client, and those that Kubernetes sets for a service of this name, are no mistakes."""
    for name in ("MODLE", "max_promts", "URL", "SERVICE_HOST", "PORT_8000_TCP", "REQUIRE_KERNELS", "MODEL"):
        monkeypatch.setenv(f"QWEN3_ENCODER_{name}", "demo")
    main(["presets"])

    assert [record.getMessage() for record in caplog.records] == [
        "QWEN3_ENCODER_MODLE: is no setting and is ignored. Did you mean QWEN3_ENCODER_MODEL?",
        "QWEN3_ENCODER_max_promts: is no setting and is ignored. Did you mean QWEN3_ENCODER_MAX_PROMPTS?",
    ]


def test_a_key_is_what_a_header_can_carry() -> None:
    """A key that is read from a file ends in a line end."""
    key = load_settings({"api_key": " secret\n"}).api_key

    assert key is not None and key.get_secret_value() == "secret"


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_an_empty_name_of_a_checkpoint_is_not_the_demo(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "", "folder"][: 3 if command == "convert" else 2])

    assert caught.value.code == 2
    assert "CHECKPOINT: is empty" in capsys.readouterr().err


def test_a_list_is_one_flag_with_commas_or_several_flags() -> None:
    given = vars(make_parser().parse_args(["inspect", "demo", "--lora", "a:0.5, b", "--lora", "c"]))

    assert load_settings({"lora": given["lora"]}).model_options().loras == (Lora("a", 0.5), Lora("b"), Lora("c"))


def test_every_setting_is_documented() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        unit = {"bytes": "bytes", "s": "seconds", "tokens": "okens", "chars": "characters"}.get(
            name.rpartition("_")[2], ""
        )
        assert unit in field.description, name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param({"port": "99999"}, ["--port", "QWEN3_ENCODER_PORT", "99999"], id="port"),
        pytest.param({"port": "x"}, ["--port", "x"], id="no number"),
        pytest.param({"max_prompts": "0"}, ["--max-prompts", "0"], id="limit 0"),
        pytest.param({"request_timeout_s": "inf"}, ["--request-timeout-s", "inf"], id="infinite"),
        pytest.param({"request_timeout_s": "nan"}, ["--request-timeout-s", "nan"], id="nan"),
        pytest.param({"cache_bytes": "-1"}, ["--cache-bytes", "-1"], id="negative"),
        pytest.param({"compute_dtype": "int8"}, ["--compute-dtype", "int8", "bfloat16"], id="dtype"),
        pytest.param({"compute_dtype": "float16"}, ["force_float16"], id="float16"),
        pytest.param({"default_preset": "sdxl"}, ["default_preset", "sdxl", "z-image"], id="preset"),
        pytest.param({"predict_preset": "sdxl"}, ["predict_preset", "sdxl", "z-image"], id="preset of a drop-in"),
        pytest.param({"only_presets": "sdxl"}, ["only_presets", "sdxl", "z-image"], id="unknown preset to serve"),
        pytest.param(
            {"only_presets": "z-image", "default_preset": "flux2-klein"},
            ["default_preset", "flux2-klein", "allowed are z-image."],
            id="default preset that is not served",
        ),
        pytest.param(
            {"only_presets": "z-image", "predict_preset": "flux2-klein"},
            ["predict_preset", "flux2-klein", "allowed are z-image."],
            id="preset of a drop-in that is not served",
        ),
        pytest.param({"presets": "no.toml"}, ["presets", "no.toml", "No such file"], id="no file of presets"),
    ],
)
def test_a_bad_value_names_flag_and_variable_in_one_line(flags: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)

    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_bad_variable_is_one_line_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWEN3_ENCODER_PORT", "eighty")

    assert main(["serve"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "QWEN3_ENCODER_PORT" in line
    assert "eighty" in line


def test_an_api_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"api_key": ["hush"]})

    assert "hush" not in str(caught.value)
    assert "hush" not in repr(load_settings({"api_key": "hush"}))
