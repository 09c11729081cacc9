"""`buddyrun top`'s screens: real sockets and recordings, frames of an engine that only counts."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from runner.frames import Frame
from runner.recording import Recorder, Replay
from runner.screens import MonitorRequest
from runner.watch import Running, find
from tests.tui.fake_engine import FakeEngine
from tests.tui.monitor_app import screen_text
from tests.tui.socket_engine import SocketEngine
from tui.engine_list import EngineList
from tui.help_screen import HelpScreen
from tui.monitor import Monitor
from tui.monitor_screen import MonitorScreen
from tui.top_app import TopApp
from tui.widgets.headline import Headline

SIZE = (100, 30)
MINE, MY_PARENT = os.getpid(), os.getppid()  # two processes that are alive


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def engines() -> Iterator[Callable[..., SocketEngine]]:
    started: list[SocketEngine] = []

    def start(pid: int, name: str) -> SocketEngine:
        engine = SocketEngine(pid, FakeEngine(pid=pid, name=name).frame())
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.end()


async def until(pilot: Pilot[None], is_so: Callable[[], bool]) -> None:
    """Wait for what threads bring about."""
    for _ in range(500):
        await pilot.pause(0.01)
        if is_so():
            return
    raise AssertionError(f"it did not happen; the screen:\n{screen_text(pilot.app)}")


def says(pilot: Pilot[None], words: str) -> Callable[[], bool]:
    return lambda: words in screen_text(pilot.app)


def recording(path: Path, n: int = 6) -> Replay:
    with Recorder(path) as recorder:
        for frame in FakeEngine(name="Recorded").frames(n):
            recorder.write(frame)
    return Replay(path)


async def test_a_single_engine_is_shown_at_once(engines: Callable[..., SocketEngine]) -> None:
    engines(MINE, "Only one")
    app = TopApp(MonitorRequest(tuple(find(None))))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "Only one"))
        assert isinstance(app.screen, MonitorScreen)
        assert "generating" in app.screen.query_one(Headline).plain


async def test_of_several_one_is_chosen_and_another_afterwards(
    engines: Callable[..., SocketEngine],
) -> None:
    engines(MINE, "Mine"), engines(MY_PARENT, "Another")
    found = tuple(find(None))
    app = TopApp(MonitorRequest(found))
    async with app.run_test(size=SIZE) as pilot:
        assert isinstance(app.screen, EngineList)
        await pilot.press("down", "enter")
        await until(pilot, says(pilot, f"{found[1].name}  Q4_K"))
        await pilot.press("l")
        await until(pilot, lambda: isinstance(app.screen, EngineList))
        await until(pilot, says(pilot, found[0].name))
        await pilot.press("enter")
        await until(pilot, says(pilot, f"{found[0].name}  Q4_K"))


async def test_the_list_looks_again_and_keeps_its_mark(
    engines: Callable[..., SocketEngine],
) -> None:
    app = TopApp(MonitorRequest())
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "No buddyrun of this user is running"))
        first = engines(MINE, "First [red]\x1b[0m")
        await pilot.press("r")
        await until(pilot, says(pilot, "First [red]␛[0m"))
        first.send(replace(FakeEngine(pid=MINE, name="First").frame(), phase="paused"))
        await pilot.press("r")
        await until(pilot, says(pilot, "paused"))
        assert app.screen.query_one(OptionList).highlighted == 0


async def test_when_the_engine_goes_its_last_frame_stays(
    engines: Callable[..., SocketEngine],
) -> None:
    engine = engines(MINE, "Short life")
    app = TopApp(MonitorRequest(tuple(find(None))))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "Short life"))
        engine.end()
        await until(pilot, says(pilot, f"ended: the engine's process {MINE} is gone; l shows"))
        assert "Short life" in screen_text(app) and "router" in screen_text(app)


async def test_w_waits_for_the_next_engine(engines: Callable[..., SocketEngine]) -> None:
    first = engines(MINE, "First")
    app = TopApp(MonitorRequest(tuple(find(None))))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "First"))
        first.end()
        await until(pilot, says(pilot, "w waits"))
        await pilot.press("w")
        await until(pilot, says(pilot, "Waiting for the next buddyrun"))
        engines(MY_PARENT, "Second")
        await pilot.press("r")
        await until(pilot, says(pilot, "Second  Q4_K"))


async def test_frames_go_to_the_recorder_all_of_them(
    engines: Callable[..., SocketEngine], tmp_path: Path
) -> None:
    engine, fake = engines(MINE, "Kept"), FakeEngine(pid=MINE, name="Kept")
    frames: list[Frame] = fake.frames(9)
    with Recorder(tmp_path / "kept.jsonl") as recorder:
        app = TopApp(MonitorRequest(tuple(find(None)), recorder=recorder))
        async with app.run_test(size=SIZE) as pilot:
            await until(pilot, says(pilot, "Kept"))
            for frame in frames:
                engine.send(frame)
            kept = Replay(tmp_path / "kept.jsonl")
            await until(pilot, lambda: len(list(kept.all())) == len(frames))
    assert list(kept.all()) == frames, "the first one is told when the viewer comes, too"


async def test_a_recording_is_played_and_its_end_is_said(tmp_path: Path) -> None:
    app = TopApp(MonitorRequest(replay=recording(tmp_path / "a.jsonl")))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "ended: the recording is over; space plays it again"))
        assert "Recorded" in screen_text(app)
        await pilot.press("space")
        await until(pilot, lambda: not says(pilot, "ended")())
        await until(pilot, says(pilot, "ended: the recording is over"))


async def test_space_holds_a_recording(tmp_path: Path) -> None:
    app = TopApp(MonitorRequest(replay=recording(tmp_path / "a.jsonl", n=30)))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, says(pilot, "Recorded"))
        await pilot.press("space")
        await until(pilot, says(pilot, "Held; space goes on"))
        await pilot.pause(0.3)  # a frame that was on its way
        history = app.screen.query_one(Monitor)._history
        n = len(history.trend)
        await pilot.pause(0.5)
        assert len(history.trend) == n < 29
        await pilot.press("space")
        await until(pilot, lambda: len(history.trend) > n)


async def test_a_recording_of_a_chat_that_was_killed_is_played_to_its_last_whole_line(
    tmp_path: Path,
) -> None:
    replay = recording(tmp_path / "a.jsonl", n=2)
    text = replay.path.read_bytes()
    replay.path.write_bytes(text[:-100])
    app = TopApp(MonitorRequest(replay=replay))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "the recording is over"))


async def test_what_is_no_recording_is_said(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("[bold]hello\n")
    app = TopApp(MonitorRequest(replay=Replay(tmp_path / "b.jsonl")))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "ended: not a line of a recording: b'[bold]hello"))


async def test_a_watched_engine_cannot_be_changed(engines: Callable[..., SocketEngine]) -> None:
    engines(MINE, "Watched")
    app = TopApp(MonitorRequest(tuple(find(None))))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await until(pilot, says(pilot, "Watched"))
        await pilot.press("e")
        await until(pilot, says(pilot, "This buddyrun is only"))


async def test_help_opens_and_q_leaves(tmp_path: Path) -> None:
    app = TopApp(MonitorRequest(replay=recording(tmp_path / "a.jsonl")))
    async with app.run_test(size=SIZE) as pilot:
        for key in ("f1", "question_mark"):
            await pilot.press(key)
            assert isinstance(app.screen, HelpScreen)
            await pilot.press("escape")
        await pilot.press("q")
        await pilot.pause()
        assert not app.is_running


async def test_the_command_palette_offers_views_and_themes(tmp_path: Path) -> None:
    app = TopApp(MonitorRequest(replay=recording(tmp_path / "a.jsonl")))
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause()
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert "View: substitutions" in titles and "Theme" in titles
        monitor = app.screen.query_one(Monitor)
        await pilot.press("ctrl+p", *"loads")
        await until(pilot, says(pilot, "View: loads"))
        await pilot.press("enter")
        await until(pilot, lambda: monitor.view == 4)


@pytest.mark.parametrize("theme", ["textual-light", "nord", "ansi-dark"])
async def test_themes_change_colours_and_break_nothing(theme: str, tmp_path: Path) -> None:
    app = TopApp(MonitorRequest(replay=recording(tmp_path / "a.jsonl")))
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "Recorded"))
        app.theme = theme
        await pilot.press("2", "down")
        await pilot.pause()
        assert "Recorded" in screen_text(app)


class StuckFind:
    """Looks for engines and does not come back until it is let."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.threads: list[threading.Thread] = []

    def __call__(self) -> list[Running]:
        self.threads.append(threading.current_thread())
        self.may_answer.wait(20)
        return []


async def test_a_look_that_does_not_come_back_is_the_only_one_and_q_leaves() -> None:
    find_running = StuckFind()
    app = TopApp(MonitorRequest(), find_running)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.press("r", "r", "r")
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)
    assert len(find_running.threads) == 1
    assert find_running.threads[0].is_alive() and find_running.threads[0].daemon
    find_running.may_answer.set()


async def test_the_list_is_there_at_once_and_keys_work_while_it_looks(
    engines: Callable[..., SocketEngine],
) -> None:
    engines(MINE, "Only one")
    find_running = StuckFind()
    app = TopApp(MonitorRequest(tuple(find(None))), find_running)
    async with app.run_test(size=SIZE) as pilot:
        await until(pilot, says(pilot, "Only one"))
        await pilot.press("l")
        await until(pilot, says(pilot, "Looking for engines"))
        assert not find_running.may_answer.is_set()
        find_running.may_answer.set()
        await until(pilot, says(pilot, "No buddyrun of this user is running"))


async def test_an_engine_that_ended_before_it_was_chosen_is_not_chosen() -> None:
    frame = FakeEngine(pid=MINE, name="Ended").frame()
    app = TopApp(MonitorRequest(), lambda: [])
    async with app.run_test(size=SIZE) as pilot:
        screen = EngineList((Running(frame),), False, False, lambda: [])
        await app.push_screen(screen)
        choices = screen.query_one(OptionList)
        chosen = OptionList.OptionSelected(choices, choices.get_option_at_index(0), 0)
        screen._engines = {}
        screen.post_message(chosen)
        await pilot.pause()
        assert app.screen is screen and app.is_running


ENDED = Running(FakeEngine(pid=MINE, name="Ended").frame())
AGAIN = Running(replace(FakeEngine(pid=MY_PARENT).frame(), owner_pid=ENDED.frame.owner_pid))
OTHER = Running(FakeEngine(pid=77, name="Other").frame())


@pytest.mark.parametrize("found, shown", [([AGAIN], [AGAIN]), ([ENDED, OTHER], [])])
async def test_who_waits_is_shown_what_a_program_started_in_place_of_its_engine(
    found: list[Running], shown: list[Running]
) -> None:
    app = TopApp(MonitorRequest(), lambda: found)
    chosen: list[Running | None] = []
    async with app.run_test(size=SIZE) as pilot:
        screen = EngineList(None, True, False, lambda: found, left=ENDED)
        await app.push_screen(screen, chosen.append)
        await until(pilot, lambda: screen._known is not None)
        await pilot.pause()
        assert chosen == shown
