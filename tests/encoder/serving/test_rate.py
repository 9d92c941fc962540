"""A stage's rate and the seconds that follow from it."""

import pytest

from encoder.serving.rate import MAX_S, Rate


def test_the_first_measurement_replaces_what_was_assumed() -> None:
    """An assumption of 500 tokens per second would tell the first refused client to wait for minutes at 50,000."""
    rate = Rate(500)
    rate.measure(100_000, 2.0)
    assert rate.per_s == 50_000


def test_a_later_measurement_moves_the_rate_by_a_fifth() -> None:
    """A single slow batch must not change `Retry-After` much."""
    rate = Rate(500)
    rate.measure(100, 1.0)
    rate.measure(100, 2.0)
    assert rate.per_s == pytest.approx(0.8 * 100 + 0.2 * 50)


@pytest.mark.parametrize(("amount", "seconds"), [(0, 1), (10, 1), (11, 2), (10**9, MAX_S)])
def test_retry_after_is_in_whole_seconds_within_bounds(amount: int, seconds: int) -> None:
    assert Rate(10).retry_after_s(amount) == seconds
