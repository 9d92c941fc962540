"""The command line. Every setting is a flag, made from its field in `Settings`."""

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from app import offline
from app.doctor import doctor
from app.log_format import add_request, formatter
from app.log_pipe import PipeHandler
from app.process import open_standard_files
from app.server import serve
from app.settings import Settings, SettingsError, choices, flag, load_settings, misspelt_variables, variable
from encoder import EncoderError

# What is opened, beside the model.
SOURCE_SETTINGS = ("revision", "tokenizer", "rope_theta", "component", "lora", "cache_dir")
logger = logging.getLogger(__name__)

MODEL_SETTINGS = (
    "model",
    *SOURCE_SETTINGS,
    "quantize",
    "num_layers",
    "compute_dtype",
    "force_float16",
    "presets",
    "default_preset",
    "log_level",
)

KEY_IN_PS = (
    f"every user of this machine can read a flag, in the list of processes. Use {flag('api_key_file')}, or "
    f"{variable('api_key')}."
)
CHECKPOINT_HELP = "demo, a path, a Hugging Face id or an Ollama name, as in the setting `model`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 if the command failed, 2 if its arguments are wrong."""
    open_standard_files()
    given = vars(make_parser().parse_args(arguments))
    command: Callable[..., int] = given.pop("command")
    own = {name: given.pop(name) for name in list(given) if name not in Settings.model_fields}
    if command is doctor:  # reads the settings itself, to say what is wrong with them
        return doctor(**own)
    try:
        settings = load_settings(given)
        handler = PipeHandler(2) if command is serve else logging.StreamHandler()
        set_up_logging(settings.log_level, settings.log_format, handler)
        for problem in misspelt_variables():
            logger.warning("%s", problem)
        if "api_key" in given:
            logger.warning("--api-key: %s", KEY_IN_PS)
        with interruptible():
            return command(settings, **own)
    except SettingsError as error:
        return _fail(2, str(error))
    except EncoderError as error:
        return _fail(1, str(error))
    except OSError as error:
        return _fail(1, f"{error.filename or command.__name__}: {error.strerror or error}")
    except KeyboardInterrupt as error:
        sig = error.args[0] if error.args else signal.SIGINT
        return _fail(128 + sig, f"ended by {signal.Signals(sig).name}")


def _fail(exit_code: int, reason: str) -> int:
    print("error:", *reason.splitlines(), file=sys.stderr)
    return exit_code


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl+C does, so that it clears up. The service has its own handlers."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    ending = (signal.SIGTERM, signal.SIGHUP) if in_main_thread else ()
    deadly = [sig for sig in ending if signal.getsignal(sig) is signal.SIG_DFL]  # under nohup, SIGHUP is not
    for sig in deadly:
        signal.signal(sig, _interrupt)
    try:
        yield
    finally:
        for sig in deadly:
            signal.signal(sig, signal.SIG_DFL)


def _interrupt(sig: int, _: object) -> None:
    raise KeyboardInterrupt(sig)


def make_parser() -> argparse.ArgumentParser:
    """The parser for all commands."""
    parser = argparse.ArgumentParser(prog="qwen3-encoder", description="Hidden states of a Qwen3 text encoder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _add(commands, "serve", serve, "serve hidden states over HTTP")
    add_settings(command, Settings.model_fields)

    command = _add(commands, "encode", offline.encode, "encode prompts to a file, without a server")
    command.add_argument("prompts", nargs="+", metavar="PROMPT")
    command.add_argument("-o", "--output", type=Path, required=True, help="file to write: *.safetensors or *.npy")
    command.add_argument("--preset", help="name of a preset; `presets` lists them")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=offline.DTYPE_HELP)
    add_settings(command, MODEL_SETTINGS)

    command = _add(commands, "presets", offline.presets, "list the presets")
    add_settings(command, ("presets", "only_presets"))

    command = _add(commands, "inspect", offline.inspect, "say what a checkpoint is and which presets fit it")
    command.add_argument("model", type=_not_empty, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add_settings(command, (*SOURCE_SETTINGS, "num_layers", "presets", "only_presets", "log_level"))

    command = _add(
        commands, "convert", offline.convert, "write a checkpoint's text encoder as a folder that loads fast"
    )
    command.add_argument("model", type=_not_empty, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="to write; must not exist")
    add_settings(command, (*SOURCE_SETTINGS, "quantize", "log_level"))

    command = _add(commands, "doctor", doctor, "check the installation, and print a report for an issue")
    command.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return parser


def _add(commands: Any, name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    return parser


def _not_empty(argument: str) -> str:
    """An argument that has to be given; an empty one would stand for the default."""
    if not argument.strip():
        raise argparse.ArgumentTypeError("is empty")
    return argument


class _Append(argparse.Action):
    """The flag of a list, which is separated by commas, in one flag or in several."""

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:  # noqa: ARG002
        before = getattr(namespace, self.dest, "")
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add the flag of each setting. Flags have no defaults here: the environment decides about those not given."""
    for name in names:
        field = Settings.model_fields[name]
        text = f"{field.description} Default: {field.default!r}.".replace("%", "%%")
        if field.annotation is bool:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:  # Settings checks choices: argparse would refuse an empty value, which means "not set"
            allowed = choices(field)
            kind = {"metavar": f"{{{','.join(allowed)}}}" if allowed else name.rpartition("_")[2].upper()}
            kind["action"] = _Append if field.annotation == tuple[str, ...] else "store"
        parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text, **kind)


def log_what_python_writes() -> None:
    """Log warnings, and the errors that end the process or a thread: Python would write them in lines of its own."""

    def log(*error: Any) -> None:
        logger.critical("unexpected error", exc_info=error)  # the three parts of one

    logging.captureWarnings(True)
    sys.excepthook = log
    threading.excepthook = lambda ended: log(ended.exc_type, ended.exc_value, ended.exc_traceback)


def set_up_logging(level: str, log_format: str, handler: logging.Handler) -> None:
    """Log one line per event."""
    handler.setFormatter(formatter(log_format))
    handler.addFilter(add_request)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if log_format == "json":
        log_what_python_writes()
    for chatty in ("uvicorn", "httpx", "httpcore", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
