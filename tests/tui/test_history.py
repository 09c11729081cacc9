"""Rates from frame to frame."""

from dataclasses import replace

import pytest

from tests.tui.fake_engine import FakeEngine
from tui.history import N_WINDOWS, History


def test_two_frames_make_a_window_with_their_rates() -> None:
    history = History()
    for frame in FakeEngine().frames(2):
        history.add(frame)
    (rates,) = history.trend
    assert rates is not None and rates.generation_tokens_per_s == pytest.approx(1 / 0.03)


def test_a_window_in_which_nothing_was_computed_has_no_rates() -> None:
    engine, history = FakeEngine(), History()
    for phase in ("generating", "generating", "ready", "ready"):
        history.add(engine.frame(phase))
    assert [rates is None for rates in history.trend] == [False, True, True]
    assert history.latest is history.trend[0]


def test_another_engine_begins_anew() -> None:
    history = History()
    for frame in FakeEngine().frames(5):
        history.add(frame)
    other = FakeEngine(n_layer=4, n_expert=16, pid=7)
    for frame in other.frames(2):
        history.add(frame)
    assert len(history.trend) == 1
    assert len(history.activity.rates("used")) == 4


def test_an_engine_that_was_started_again_begins_anew() -> None:
    engine, history = FakeEngine(), History()
    for frame in engine.frames(5):
        history.add(frame)
    again = FakeEngine().frame()
    history.add(again)
    assert history.trend == ()


@pytest.mark.parametrize("name", ["hit", "bytes_read", "missed", "used"])
def test_counts_of_another_length_begin_anew(name: str) -> None:
    engine, history = FakeEngine(), History()
    for frame in engine.frames(2):
        history.add(frame)
    stats = engine.stats()
    if name in ("missed", "used"):
        assert stats.experts is not None
        grid = getattr(stats.experts, name)
        shorter = {name: (grid[0][1:], *grid[1:])}
        stats = replace(stats, experts=replace(stats.experts, **shorter))
    else:
        stats = replace(stats, **{name: getattr(stats, name)[1:]})
    history.add(replace(engine.frame(), stats=stats))
    assert history.trend == ()


def test_a_frame_without_a_model_makes_no_window() -> None:
    engine, history = FakeEngine(), History()
    history.add(replace(engine.frame(), phase="loading", stats=None))
    history.add(engine.frame())
    history.add(engine.frame())
    assert len(history.trend) == 1


def test_only_the_last_while_is_kept() -> None:
    history = History()
    for frame in FakeEngine(2, 4).frames(N_WINDOWS + 20):
        history.add(frame)
    assert len(history.trend) == N_WINDOWS
