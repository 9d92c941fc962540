"""The sides of a comparison: each has a process of its own, and they take turns."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

GAP_S = 0.3  # BLAS threads spin for a while after a call, and would slow the next process down
SAMPLE = 64  # numbers of a result by which sides are compared
TOLERANCE = 0.03  # relative to the largest number; covers bfloat16 and another order of summation in 28 layers

Result = NDArray[Any] | None


class Answer(NamedTuple):
    """The seconds that a request took, and a sample of its result by which sides are compared."""

    seconds: float
    sample: list[float]


class Case(NamedTuple):
    """A request that several sides answer."""

    name: str
    request: Any
    sides: Sequence[str]


Side = Callable[[Any], Answer]


def timed(run: Callable[[Any], Result], request: Any) -> Answer:
    """Run one request."""
    started = time.perf_counter()
    result = run(request)
    seconds = time.perf_counter() - started
    if result is None:
        return Answer(seconds, [])
    numbers = np.asarray(result, np.float32).ravel()
    return Answer(seconds, numbers[np.linspace(0, numbers.size - 1, SAMPLE).astype(int)].tolist())


def answer_requests(run: Callable[[Any], Result]) -> None:
    """In a worker: answer each line of JSON on standard input with an Answer."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(run, json.loads(line))), flush=True)


class Worker:
    """A module of this package in a process of its own, which calls `answer_requests`.

    Args:
        module: run with `arguments`.
        environment: variables added to ours.
    """

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"TQDM_DISABLE": "1"} | environment,  # no progress bars of transformers in the output
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def __call__(self, request: Any) -> Answer:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Answer(*json.loads(self._read()))

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A worker ended early; its error stands above.")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def take_turns(sides: Mapping[str, Side], cases: Sequence[Case], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by case and side.

    All sides of a case must agree. The first round is a warm-up and does not count, unless `rounds` is 0.
    """
    seconds: dict[str, dict[str, list[float]]] = {case.name: {side: [] for side in case.sides} for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            answers = {side: _ask(sides[side], case) for side in case.sides}
            check_agreement(case.name, {side: answer.sample for side, answer in answers.items() if answer.sample})
            if number or not rounds:
                for side, answer in answers.items():
                    seconds[case.name][side].append(answer.seconds)
    return {case: {side: statistics.median(taken) for side, taken in row.items()} for case, row in seconds.items()}


def _ask(side: Side, case: Case) -> Answer:
    answer = side(case.request)
    time.sleep(GAP_S)
    return answer


def check_agreement(case: str, samples: Mapping[str, Sequence[float]]) -> None:
    """Compare each side's result with the first side's. Errors: SystemExit when they differ."""
    sides = list(samples)
    for side in sides[1:]:
        expected, found = np.array(samples[sides[0]]), np.array(samples[side])
        worst = float(np.max(np.abs(expected - found)) / np.max(np.abs(expected)))
        if not worst <= TOLERANCE:
            raise SystemExit(f"{case}: {side} and {sides[0]} differ by {worst:.2g} of the largest number.")
