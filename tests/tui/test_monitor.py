"""Every key of the monitor, with an engine that only counts and an owner that only listens."""

import threading
import time

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from runner.errors import OptionError
from runner.frames import RunSettings
from tests.tui.fake_engine import FakeEngine, FakeOwner
from tests.tui.monitor_app import MonitorApp, screen_text
from tui.help_screen import HelpScreen
from tui.policy_screen import PolicyScreen
from tui.views import VIEWS
from tui.widgets.cell_panel import CellPanel
from tui.widgets.headline import Headline
from tui.widgets.heat_map import HeatMap
from tui.widgets.legend import Legend
from tui.widgets.pairs import Pairs
from tui.widgets.quality import Quality

SIZE = (120, 40)


async def settled(pilot: Pilot[None]) -> None:
    """Wait until the owner has answered and everything is drawn."""
    assert isinstance(pilot.app, MonitorApp)
    until_s = time.monotonic() + 20
    while pilot.app.monitor._n_asked:
        assert time.monotonic() < until_s, "the owner never answered"
        await pilot.pause(0.01)
    await pilot.pause()


@pytest.mark.parametrize("number", range(1, 6))
async def test_a_number_shows_its_view(number: int) -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=SIZE) as pilot:
        for frame in engine.frames(10):
            app.monitor.show(frame)
        await pilot.press(str(6 - number), str(number))
        await pilot.pause()
        assert app.query_one(HeatMap).grid.view == number - 1
        legend = app.query_one(Legend).render().plain
        assert (VIEWS[number - 1].shows in legend) == (number != 4)
        assert ("stood in" in legend) == (number == 4)


async def test_a_click_on_a_views_name_shows_it() -> None:
    app = MonitorApp()
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.pause()
        place = screen_text(app).splitlines()[2].index("misses")
        await pilot.click("#views", offset=(place, 0))
        assert app.monitor.view == 2


async def test_t_changes_between_lately_and_since_loading() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=SIZE) as pilot:
        for frame in engine.frames(10):
            app.monitor.show(frame)
        await pilot.press("2")
        assert "/s lately" in app.query_one(Legend).render().plain
        await pilot.press("t")
        assert "since loading" in app.query_one(Legend).render().plain
        await pilot.press("t")
        assert "/s lately" in app.query_one(Legend).render().plain


async def test_arrows_choose_an_expert_and_it_explains_itself() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=SIZE) as pilot:
        for frame in engine.frames(9):
            app.monitor.show(frame)
        await pilot.press("down", "down", "down", "right", "right", "left", "up")
        await pilot.pause()
        assert app.query_one(HeatMap).chosen == (2, 1)
        n = engine.grids["used"][2][1]
        words = app.query_one(CellPanel).plain
        assert words.startswith("Layer 2, expert 1: ") and f"Chosen {n} times" in words


async def test_the_cursor_stays_on_the_map() -> None:
    app = MonitorApp()
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.press("up", "left", "end", "right")
        assert app.query_one(HeatMap).chosen == (0, 7)
        await pilot.press(*["pagedown"] * 5, "down", "home")
        assert app.query_one(HeatMap).chosen == (31, 0)
        await pilot.press("pageup")
        assert app.query_one(HeatMap).chosen == (23, 0)


async def test_the_mouse_asks_about_a_cell_and_a_click_chooses_it() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(engine.frame())
        await pilot.pause()
        place = (3 + 4 * 3, 5)  # expert 4 in the row of layers 10 and 11
        await pilot.hover("#heat-map", offset=place)
        assert app.query_one(CellPanel).plain.startswith("Layer 10, expert 4: ")
        assert app.query_one(HeatMap).chosen == (0, 0)
        await pilot.click("#heat-map", offset=place)
        assert app.query_one(HeatMap).chosen == (10, 4)
        await pilot.click("#heat-map", offset=place)
        assert app.query_one(HeatMap).chosen == (11, 4)
        await pilot.hover("#headline")
        assert app.query_one(CellPanel).plain.startswith("Layer 11, expert 4: ")


async def test_a_map_that_does_not_fit_scrolls_with_the_cursor() -> None:
    app = MonitorApp(is_ascii=True)
    async with app.run_test(size=(80, 24)) as pilot:
        for frame in FakeEngine().frames(4):
            app.monitor.show(frame)
        await pilot.press("2", *["pagedown"] * 4)
        await pilot.pause()
        rows = screen_text(app).splitlines()
        assert any(row.startswith("31 XXX") for row in rows)
        assert "of 32 layers, scrolls" in "\n".join(rows)
        bars = [row[28:40].strip() for row in rows if row.startswith("31 ")]
        assert bars and set(bars[0]) <= set("HSL")


@pytest.mark.parametrize(
    "keys, asked",
    [
        (["e"], [{"is_exact": True}]),
        (["p"], [{"is_paused": True}]),
        (["plus"], [{"buddy_budget": 0.09}]),
        (["minus", "minus"], [{"buddy_budget": 0.07}, {"buddy_budget": 0.06}]),
        (["b", "down", "enter"], [{"buddy": "similar"}]),
        (["b", "escape"], []),
    ],
)
async def test_a_key_changes_the_run(keys: list[str], asked: list[dict[str, object]]) -> None:
    engine = FakeEngine()
    owner = FakeOwner(engine)
    app = MonitorApp(owner)
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press(*keys)
        await settled(pilot)
        assert owner.asked == asked
        assert len(app._notifications) == len(asked)


async def test_keys_that_come_faster_than_answers_are_all_counted() -> None:
    engine, may_answer = FakeEngine(), threading.Event()

    class SlowOwner(FakeOwner):
        def change(self, *values: object) -> None:  # type: ignore[override]
            may_answer.wait(10)
            super().change(*values)  # type: ignore[arg-type]

    owner = SlowOwner(engine)
    app = MonitorApp(owner)
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press("plus", "plus", "plus")
        app.monitor.show(engine.frame())
        await pilot.press("plus")
        may_answer.set()
        await settled(pilot)
        assert [each["buddy_budget"] for each in owner.asked] == [0.09, 0.1, 0.11, 0.12]


async def test_the_budget_ends_at_nothing_and_at_everything() -> None:
    engine = FakeEngine(settings=RunSettings(False, "router", 0.005, False))
    owner = FakeOwner(engine)
    app = MonitorApp(owner)
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press("minus")
        await settled(pilot)
        engine.settings = RunSettings(False, "router", 1.0, False)
        app.monitor.show(engine.frame())
        await pilot.press("plus")
        await settled(pilot)
        assert owner.asked == [{"buddy_budget": 0.0}, {"buddy_budget": 1.0}]
        assert "no limit" in app.query_one(Quality).plain


async def test_what_the_owner_refuses_is_said_and_nothing_changes() -> None:
    engine = FakeEngine()
    owner = FakeOwner(engine, OptionError("similar needs a [profile]\x1b[2J"))
    app = MonitorApp(owner)
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press("plus")
        await settled(pilot)
        (notification,) = app._notifications
        assert notification.message == "similar needs a [profile]␛[2J"
        assert notification.severity == "error" and not notification.markup
        await pilot.press("plus")
        await settled(pilot)
        assert owner.asked == [{"buddy_budget": 0.09}] * 2


async def test_a_bug_in_the_owner_is_said_and_the_screen_stays() -> None:
    engine = FakeEngine()
    app = MonitorApp(FakeOwner(engine, KeyError("a bug")))
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press("e")
        await settled(pilot)
        (notification,) = app._notifications
        assert "KeyError: 'a bug'" in notification.message and app.is_running


async def test_an_owner_that_never_answers_does_not_keep_the_program_from_ending() -> None:
    engine, may_answer = FakeEngine(), threading.Event()
    threads: list[threading.Thread] = []

    class StuckOwner(FakeOwner):
        def change(self, *values: object) -> None:  # type: ignore[override]
            threads.append(threading.current_thread())
            may_answer.wait(20)

    app = MonitorApp(StuckOwner(engine))
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press("p", "p")
        await pilot.pause(0.1)
    assert len(threads) == 1 and threads[0].is_alive() and threads[0].daemon
    may_answer.set()


@pytest.mark.parametrize("key", ["e", "plus", "minus", "b", "p"])
async def test_who_only_watches_is_told_so(key: str) -> None:
    app = MonitorApp(owner=None)
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.press(key)
        await settled(pilot)
        (notification,) = app._notifications
        assert "only watched" in notification.message
        assert not isinstance(app.screen, PolicyScreen)


async def test_before_a_model_is_loaded_there_is_nothing_to_change() -> None:
    app = MonitorApp(FakeOwner(FakeEngine()))
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("e", "2", "down", "t")
        await settled(pilot)
        (notification,) = app._notifications
        assert notification.message == "No model is loaded yet."


async def test_the_list_of_policies_begins_at_the_one_that_holds() -> None:
    engine = FakeEngine()
    app = MonitorApp(FakeOwner(engine))
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(engine.frame())
        await pilot.press("b")
        choices = app.screen.query_one(OptionList)
        assert choices.highlighted is not None
        assert choices.get_option_at_index(choices.highlighted).id == "router"


async def test_a_question_mark_explains_and_escape_goes_back() -> None:
    app = MonitorApp()
    async with app.run_test(size=SIZE) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.press("question_mark")
        assert isinstance(app.screen, HelpScreen)
        await pilot.pause()
        assert "exact: nobody stands in" in screen_text(app)
        assert "back to the list of running engines" in screen_text(app)
        await pilot.press("escape")
        assert not isinstance(app.screen, HelpScreen)


async def test_the_end_is_said_and_the_last_frame_stays() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=SIZE) as pilot:
        for frame in engine.frames(2):  # the second comes too soon to be drawn at once
            app.monitor.show(frame)
        app.monitor.show_ended("killed [by] somebody\x1b[31m")
        await pilot.pause()
        text = screen_text(app)
        assert "ended: killed [by] somebody␛[31m" in text
        assert app.monitor.frame is frame and "Fake 8x7B" in text
        app.monitor.show(FakeEngine(name="Another", pid=9).frame())
        await pilot.pause()
        assert "ended" not in app.query_one(Headline).plain and "Another" in screen_text(app)


async def test_frames_that_come_at_once_are_counted_and_not_all_drawn() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=SIZE) as pilot:
        frames = engine.frames(5)
        drawn = []
        for frame in frames:
            app.monitor.show(frame)
            await pilot.pause()
            drawn.append(app.monitor.frame is frame)
        assert drawn == [True, False, True, False, True]
        assert len(app.monitor._history.trend) == 4
        paused = engine.frame("paused")
        app.monitor.show(paused)
        assert app.monitor.frame is paused  # a change is drawn at once


async def test_shares_are_of_the_last_while_and_of_all_when_nothing_is_done() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=SIZE) as pilot:
        engine.settings = RunSettings(True, "router", 0.08, False)
        for frame in engine.frames(6):
            app.monitor.show(frame)
        engine.settings = RunSettings(False, "router", 0.08, False)
        for frame in engine.frames(3):
            app.monitor.show(frame)
        await pilot.pause()
        assert frame.stats is not None
        lately = app.query_one(Pairs).plain
        app.monitor.show(engine.frame("ready"))
        await pilot.pause()
        assert app.query_one(Pairs).plain != lately
        assert f"hit {frame.stats.hit_share * 100:.0f} %" in app.query_one(Pairs).plain
