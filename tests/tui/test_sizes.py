"""The monitor in every room, with every kind of model, and with characters of every terminal."""

from dataclasses import replace

import pytest

from runner.frames import Frame
from tests.tui.fake_engine import FakeEngine
from tests.tui.monitor_app import MonitorApp, screen_text
from tui.policy_screen import PolicyScreen
from tui.widgets.heat_map import HeatMap
from tui.widgets.legend import Legend

ENGINES = {
    "mixtral": lambda: FakeEngine(),
    "qwen": lambda: FakeEngine(48, 128, 8, 40, tokens_per_frame=1),
    "dense": lambda: FakeEngine(16, 0, 0, 0),
    "one cell": lambda: FakeEngine(1, 1, 1, 1),
    "no cache": lambda: FakeEngine(slots=0),
}


@pytest.mark.parametrize("size", [(20, 5), (1, 1), (38, 12), (48, 24), (80, 24), (120, 40)])
@pytest.mark.parametrize("kind", ENGINES)
async def test_nothing_breaks(size: tuple[int, int], kind: str) -> None:
    app, engine = MonitorApp(), ENGINES[kind]()
    async with app.run_test(size=size) as pilot:
        for frame in engine.frames(3):
            app.monitor.show(frame)
        await pilot.press("4", "down", "right", "pagedown", "end", "t", "2")
        await pilot.pause()
        rows = screen_text(app).splitlines()
        assert len(rows) == size[1] and {len(row) for row in rows} == {size[0]}


async def test_a_small_room_says_how_much_it_takes() -> None:
    app = MonitorApp()
    async with app.run_test(size=(30, 8)) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.pause()
        assert "Too small: the monitor needs" in screen_text(app)
        assert "38 x 12." in screen_text(app)


async def test_a_screen_that_shrinks_and_grows_again_is_whole_again() -> None:
    app, engine = MonitorApp(), FakeEngine()
    async with app.run_test(size=(120, 40)) as pilot:
        for frame in engine.frames(3):
            app.monitor.show(frame)
        await pilot.pause()
        before = screen_text(app)
        await pilot.resize_terminal(20, 5)
        await pilot.pause()
        await pilot.resize_terminal(120, 40)
        await pilot.pause()
        assert screen_text(app) == before


async def test_mixtral_fits_a_small_terminal_without_scrolling() -> None:
    app = MonitorApp()
    async with app.run_test(size=(80, 24)) as pilot:
        for frame in FakeEngine().frames(3):
            app.monitor.show(frame)
        await pilot.press("2")
        await pilot.pause()
        places = app.query_one(HeatMap).places
        assert places.n_rows == app.query_one(HeatMap).size.height == 16
        text = screen_text(app)
        for words in ("tokens/s", "hit rate", "read GB/s", "slots", "budget", "verified", "Python"):
            assert words in text
        assert "scrolls" not in text


async def test_a_hundred_and_twenty_eight_experts_share_columns_and_the_legend_says_so() -> None:
    app = MonitorApp()
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(ENGINES["qwen"]().frame())
        await pilot.pause()
        assert app.query_one(HeatMap).places.experts_per_column == 4
        assert "strongest of 4 experts a column" in app.query_one(Legend).render().plain


async def test_a_dense_model_gets_a_sentence_in_the_place_of_a_map() -> None:
    app = MonitorApp()
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(ENGINES["dense"]().frame())
        await pilot.pause()
        assert "This model has no experts" in screen_text(app)


async def test_beside_a_chat_everything_is_in_one_column() -> None:
    app = MonitorApp(width=48)
    async with app.run_test(size=(120, 40)) as pilot:
        for frame in FakeEngine().frames(3):
            app.monitor.show(frame)
        await pilot.pause()
        rows = screen_text(app).splitlines()
        assert all(row[48:].strip() == "" for row in rows[:-1])
        text = "\n".join(rows)
        assert text.index("Layer 0, expert 0") < text.index("hit rate") < text.index("slots")


@pytest.mark.parametrize("size", [(20, 5), (48, 30), (80, 24), (120, 40), (200, 60)])
async def test_a_poor_terminal_gets_ascii_only(size: tuple[int, int]) -> None:
    app, engine = MonitorApp(is_ascii=True), FakeEngine(name="Größe 8x7B \x1b[31m")
    async with app.run_test(size=size) as pilot:
        for frame in engine.frames(5):
            app.monitor.show(frame)
        for view in "12345":
            await pilot.press(view, "t", "down")
            await pilot.pause()
            text = screen_text(app)
            assert text.isascii(), [c for c in text if not c.isascii()]


async def test_help_and_the_list_of_policies_are_ascii_too() -> None:
    app = MonitorApp(is_ascii=True)
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.press("question_mark")
        await pilot.pause()
        assert screen_text(app).isascii()
        await pilot.press("escape")
        app.push_screen(PolicyScreen("router", True))
        await pilot.pause()
        assert "Who stands in" in screen_text(app) and screen_text(app).isascii()


async def test_names_from_outside_are_text_and_nothing_else() -> None:
    engine = FakeEngine(name="[red]\x1b[31m[/] \u202egnp.exe\u200b")
    app = MonitorApp()
    async with app.run_test(size=(120, 40)) as pilot:
        frame = engine.frame()
        app.monitor.show(replace(frame, phase="measuring", stage="[bold]a\nb\x07"))
        await pilot.pause()
        text = screen_text(app)
        assert "[red]␛[31m[/] <U+202E>gnp.exe<U+200B>" in text
        assert "measuring [bold]a␊b␇" in text


async def test_another_model_changes_the_map() -> None:
    app = MonitorApp()
    async with app.run_test(size=(120, 40)) as pilot:
        for frame in FakeEngine().frames(3):
            app.monitor.show(frame)
        await pilot.press(*["pagedown"] * 4, "end")
        small = FakeEngine(4, 4, slots=2, pid=1)
        app.monitor.show(small.frame())
        await pilot.pause()
        heat_map = app.query_one(HeatMap)
        assert heat_map.chosen == (3, 3) and heat_map.places.n_layer == 4


async def test_loading_shows_how_far_it_is() -> None:
    app = MonitorApp()
    frame = Frame(1, 2, "0.1.0", 0.0, "loading", "weights", 3, 4)
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(frame)
        await pilot.pause()
        assert "loading weights, 75 %  ███████████████░░░░░" in screen_text(app)
        assert "no model yet" in screen_text(app)
