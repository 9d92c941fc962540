"""The benchmarks' bookkeeping. What they measure is measured by hand, on a quiet machine."""

import json
from pathlib import Path

import pytest

from benchmarks import micro
from benchmarks.checkpoints import read_prompts
from benchmarks.mixed import mixed_requests
from benchmarks.report import Row, compare, render, report
from benchmarks.workers import Answer, Case, check_agreement, take_turns


def test_a_report_says_what_was_measured_on_which_machine_and_commit(tmp_path: Path) -> None:
    with report(tmp_path / "run.json") as rows:
        rows.append(compare("forward", "benchmarks.forward", {"ours": 0.5, "torch": 1.25}, goal=2.0))

    run = json.loads((tmp_path / "run.json").read_text())["run"]
    assert all(run[name] for name in ("date", "cpu", "cpus", "commit", "command", "blas"))
    assert {"python", "mlx", "numpy"} <= set(run["versions"])
    table = (tmp_path / "run.md").read_text()
    assert "| forward | 2.5 × | ≥ 2 | ours 0.5, torch 1.25 s | `benchmarks.forward` |" in table


def test_a_stored_run_renders_as_it_did(tmp_path: Path) -> None:
    """docs/benchmarks.md is made from the JSON, not from the run."""
    with report(tmp_path / "run.json") as rows:
        rows.append(Row("memory", "benchmarks.soak", 1.5, "%", 2.0, at_least=False))

    assert render(json.loads((tmp_path / "run.json").read_text())) == (tmp_path / "run.md").read_text()


@pytest.mark.parametrize(
    ("result", "at_least", "reached"), [(1.9, True, False), (2.0, True, True), (2.1, False, False), (2.0, False, True)]
)
def test_a_goal_that_is_missed_says_so(result: float, at_least: bool, reached: bool) -> None:
    row = Row("figure", "benchmarks.blas", result, goal=2.0, at_least=at_least)

    assert row.reached == reached
    assert ("missed" in row.markdown()) != reached


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    """Else a side that warms up, or a machine that slows down, would look like a slow program."""
    asked: list[str] = []

    def side(name: str, seconds: list[float]) -> Answer:
        asked.append(name)
        return Answer(seconds.pop(0), [1.0])

    slow, fast = [9.0, 3.0, 5.0], [9.0, 1.0, 1.0]
    sides = {"slow": lambda _: side("slow", slow), "fast": lambda _: side("fast", fast)}

    medians = take_turns(sides, [Case("case", None, ("slow", "fast"))], rounds=2)

    assert asked == ["slow", "fast"] * 3
    assert medians == {"case": {"slow": 4.0, "fast": 1.0}}


def test_sides_that_compute_different_things_are_not_compared() -> None:
    check_agreement("case", {"ours": [1.0, 2.0], "torch": [1.001, 2.0]})

    with pytest.raises(SystemExit, match="torch and ours differ"):
        check_agreement("case", {"ours": [1.0, 2.0], "torch": [2.0, 1.0]})


def test_mixed_requests_are_the_same_in_every_run_and_none_is_asked_twice() -> None:
    """Else the cache would answer some of them."""
    prompts = read_prompts()

    requests = mixed_requests(prompts, 500)

    assert requests == mixed_requests(prompts, 500)
    assert len({asked.prompt for asked in requests}) == 500
    assert {asked.preset for asked in requests} == {"z-image", "last-hidden-state", "flux2-klein"}


@pytest.mark.parametrize("step", micro.STEPS)
def test_each_step_that_is_measured_by_itself_runs(step: str) -> None:
    assert micro.seconds(micro.STEPS[step], loops=2) > 0


@pytest.mark.parametrize("step", micro.ASYNC_STEPS)
def test_each_asynchronous_step_that_is_measured_by_itself_runs(step: str) -> None:
    """Each checks what it is answered, so that no error is measured."""
    assert micro.seconds_on_loop(micro.ASYNC_STEPS[step], loops=2) > 0
