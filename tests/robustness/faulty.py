"""The real service, in which a function fails when it is told to.

    python -m tests.robustness.faulty serve --port 8000

runs `qwen3-encoder` with these arguments. Each line on standard input is an order:

    strike STAGE KIND TIMES     from now on, a call of that function fails, TIMES times; 0 is for ever
    stop                        nothing fails any more, and what hangs goes on

Each order is answered with `ok` on standard output, and each failure with `struck`. The end of standard input ends the
process, so that none is left behind.
"""

import asyncio
import functools
import inspect
import os
import pkgutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SLOW_S = 1.0
HANG_S = 600.0  # longer than any test waits

SERVING = "encoder.serving"
STAGES = {
    # before a request has entries
    "read-body": "app.request.body._read",
    "parse-body": "app.request.body.parse_json",
    "tokenize": "encoder.text_encoder.TextEncoder.tokenize",
    "recent-tokens": f"{SERVING}.recent_tokens.RecentTokens.get",
    "plan": "encoder.text_encoder.TextEncoder.plan",
    "check-output": "encoder.pipeline.limits.Limits.check_output",
    # look-ups
    "ask-memory": f"{SERVING}.cache.result_cache.ResultCache.get_from_memory",
    "ask-disk": f"{SERVING}.cache.result_cache.ResultCache.find_on_disk",
    "read-disk": f"{SERVING}.cache.folder.ResultFolder.read",
    "write-disk": f"{SERVING}.cache.folder.ResultFolder.write",
    "touch-disk": f"{SERVING}.cache.folder.ResultFolder.touch",
    "store": f"{SERVING}.cache.result_cache.ResultCache.put",
    "find-in-flight": f"{SERVING}.in_flight.InFlight.find",
    "add-in-flight": f"{SERVING}.in_flight.InFlight.add",
    # queue and model thread
    "queue": f"{SERVING}.batcher.Batcher.put",
    "take-batch": f"{SERVING}.batcher.Batcher.take_batch",
    "discard": f"{SERVING}.batcher.Batcher.discard",
    "wake": f"{SERVING}.batch_loop.BatchLoop._wake",
    "take": f"{SERVING}.batch_loop.BatchLoop._take",
    "finish": f"{SERVING}.batch_loop.BatchLoop._finish",
    "rest": f"{SERVING}.batch_loop.BatchLoop._rest",
    "count-tokens": "encoder.qwen3.cpu.forward.CpuForward.count_rows",
    "begin": "encoder.text_encoder.TextEncoder.begin",
    "dispatch": "encoder.text_encoder.TextEncoder.dispatch",
    "select": "encoder.text_encoder.select",
    "collect": "encoder.text_encoder.TextEncoder.collect",
    "export": "encoder.text_encoder.export",
    "detach": "encoder.types.PromptEmbeds.detach",
    "hand-over": f"{SERVING}.batch_loop.BatchLoop._hand_over",
    # back on the event loop
    "deliver-all": f"{SERVING}.batch_loop.BatchLoop._deliver",
    "deliver": f"{SERVING}.in_flight.InFlight.deliver",
    "settle": f"{SERVING}.in_flight.InFlight.settle",
    "count": f"{SERVING}.batch_loop.BatchLoop._count",
    # the reply
    "build-reply": "app.reply.reply._build",
    "collate": "app.reply.reply.collate",
    "token-names": f"{SERVING}.engine.Engine.tokens",
    "metrics": "app.metrics.Metrics.observe_request",
    "log": "logging.Handler.handle",
    # the start
    "load": "encoder.text_encoder.TextEncoder.open",
    "identity": f"{SERVING}.cache.result_cache.model_identity",
    "warm-up": f"{SERVING}.model_thread.warm_up",
}
ON_LOOP = frozenset(  # where a hang stops the event loop
    [
        *("parse-body", "recent-tokens", "plan", "check-output", "ask-memory", "store", "find-in-flight"),
        *("add-in-flight", "queue", "discard", "wake", "deliver-all", "deliver", "settle", "count", "metrics", "log"),
    ]
)
RAISES: dict[str, type[BaseException]] = {
    "exception": RuntimeError,
    "memory": MemoryError,
    "exit": SystemExit,
}
KINDS = (*RAISES, "hang", "slow", "nan")


class Plan:
    """What fails now. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage, self._kind, self._left = "", "", 0
        self.released = threading.Event()

    def set(self, stage: str, kind: str, times: int) -> None:
        """Fail so many times from now on; 0 is for ever."""
        with self._lock:
            self._stage, self._kind, self._left = stage, kind, times or -1
            self.released = threading.Event()

    def stop(self) -> None:
        """Fail no more."""
        with self._lock:
            self._stage = ""
            self.released.set()

    def kind(self, stage: str) -> str:
        """How this call fails; empty if it does not."""
        if stage != self._stage:
            return ""
        with self._lock:
            if stage != self._stage or not self._left:
                return ""
            self._left -= 1
        say("struck")
        return self._kind


PLAN = Plan()


def say(word: str) -> None:
    """One line on standard output, whatever the process uses it for."""
    os.write(1, f"{word}\n".encode())


def plant(stage: str, path: str) -> None:
    """Wrap one function. Errors: AttributeError where the service no longer has it."""
    owner_path, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(owner_path)
    static = inspect.getattr_static(owner, name)
    function = static.__func__ if isinstance(static, classmethod | staticmethod) else static
    wrapped = wrap(stage, function)
    setattr(owner, name, type(static)(wrapped) if isinstance(static, classmethod | staticmethod) else wrapped)


def wrap(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails as planned."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def fail_or_await(*args: Any, **kwargs: Any) -> Any:
            kind = PLAN.kind(stage)
            if kind == "hang":
                await asyncio.sleep(HANG_S)
            elif kind == "slow":
                await asyncio.sleep(SLOW_S)
            elif kind:
                raise RAISES[kind](f"planted in {stage}")
            return await function(*args, **kwargs)

        return fail_or_await

    @functools.wraps(function)
    def fail_or_call(*args: Any, **kwargs: Any) -> Any:
        kind = PLAN.kind(stage)
        if kind == "nan":
            return function(with_nan(args[0]), *args[1:], **kwargs)
        if kind == "hang":
            PLAN.released.wait(HANG_S)
        elif kind == "slow":
            time.sleep(SLOW_S)
        elif kind:
            raise RAISES[kind](f"planted in {stage}")
        return function(*args, **kwargs)

    return fail_or_call


def with_nan(hidden_states: dict[Any, Any]) -> dict[Any, Any]:
    """The hidden states of a pass, none of them a number."""
    return {tap: [rows * float("nan") for rows in batch] for tap, batch in hidden_states.items()}


def obey() -> None:
    """Follow the orders on standard input."""
    for line in sys.stdin:
        order, *arguments = line.split()
        if order == "stop":
            PLAN.stop()
        else:
            stage, kind, times = arguments
            PLAN.set(stage, kind, int(times))
        say("ok")
    os._exit(70)


def main() -> int:
    # Before anything is imported that could bind the functions to other names.
    for stage, path in STAGES.items():
        plant(stage, path)
    first = os.environ.get("FAULT_AT_START", "")
    if first:
        stage, kind, times = first.split()
        PLAN.set(stage, kind, int(times))
    threading.Thread(target=obey, daemon=True).start()
    from app.cli import main as serve

    return serve()


if __name__ == "__main__":
    sys.exit(main())
