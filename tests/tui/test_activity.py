"""What experts did lately, by hand-made counts."""

import pytest

from runner.expert_counts import ExpertCounts
from tui.activity import HALF_LIFE_S, Activity


def counts(*missed: int) -> ExpertCounts:
    grid = (missed,)
    zeros = ((0,) * len(missed),)
    return ExpertCounts((), grid, zeros, zeros, zeros, ())


def test_the_first_moment_has_nothing_to_compare_with() -> None:
    activity = Activity()
    activity.add(counts(7, 0), 10.0)
    assert activity.rates("missed") == [] and activity.peak("missed") == 0.0


def test_a_steady_count_becomes_its_rate() -> None:
    activity = Activity()
    for second in range(40):
        activity.add(counts(3 * second, 0), float(second))
    assert activity.rates("missed")[0] == pytest.approx([3.0, 0.0], rel=1e-4)


def test_what_stopped_is_half_after_a_half_life_and_gone_in_the_end() -> None:
    activity = Activity()
    activity.add(counts(0), 0.0)
    activity.add(counts(8), 1.0)
    before = activity.rates("missed")[0][0]
    activity.add(counts(8), 1.0 + HALF_LIFE_S)
    assert activity.rates("missed")[0][0] == pytest.approx(before / 2)
    for n in range(30):
        activity.add(counts(8), 2.0 + HALF_LIFE_S * (n + 1))
    assert activity.rates("missed")[0] == [0.0]


def test_the_peak_stays_longer_than_the_glow() -> None:
    activity = Activity()
    activity.add(counts(0), 0.0)
    activity.add(counts(8), 1.0)
    peak = activity.peak("missed")
    activity.add(counts(8), 5.0)
    assert activity.rates("missed")[0][0] < peak / 3
    assert activity.peak("missed") > peak * 0.8


def test_what_nobody_counts_has_no_rates() -> None:
    activity = Activity()
    activity.add(counts(0), 0.0)
    activity.add(counts(1), 1.0)
    assert activity.rates("used") == []


def test_a_grid_that_nobody_looked_at_is_as_fresh_as_one_that_was_watched() -> None:
    watched, unwatched = Activity(), Activity()
    for n in range(400):
        moment = counts(n * n // 100, n), n / 5
        for activity in (watched, unwatched):
            activity.add(*moment)
        watched.rates("missed")
    assert unwatched.rates("missed")[0] == pytest.approx(watched.rates("missed")[0], rel=0.05)
    assert unwatched.peak("missed") == pytest.approx(watched.peak("missed"), rel=0.05)
