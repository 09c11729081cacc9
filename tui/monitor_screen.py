"""A monitor on the whole screen, of one engine that is watched or of a recording."""

from functools import partial
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer

from runner.client import Replay, Running
from tui.frame_source import (
    EngineSource,
    FrameArrived,
    FramesEnded,
    FrameSource,
    OneAtATime,
    ReplaySource,
    read_frames,
)
from tui.monitor import Monitor
from tui.widgets.heat_map import HeatMap

LIST, WAIT = "list", "wait"


class MonitorScreen(Screen[str]):
    """Dismissed with LIST or WAIT when a person wants another engine."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "hold", "hold"),
        Binding("l,escape", "leave('list')", "list", key_display="l"),
        Binding("w", "leave('wait')", "wait for another", show=False),
    ]

    def __init__(
        self, watched: Running | Replay, recorder: OneAtATime | None, is_ascii: bool
    ) -> None:
        super().__init__()
        self._watched = watched
        self._recorder = recorder
        self._is_ascii = is_ascii
        self._source: FrameSource | None = None
        self._has_ended = False

    def compose(self) -> ComposeResult:
        yield Monitor(is_ascii=self._is_ascii)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.query_one(HeatMap).focus()
        self._start()

    def on_unmount(self) -> None:
        if self._source is not None:
            self._source.close()

    def on_frame_arrived(self, message: FrameArrived) -> None:
        self.query_one(Monitor).show(message.frame)

    def on_frames_ended(self, message: FramesEnded) -> None:
        self._has_ended = True
        ways = "" if self._is_replay else "; l shows the others, w waits for another"
        self.query_one(Monitor).show_ended(message.reason + ways)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A recording can be held, an engine can be left for another."""
        if action == "hold":
            return self._is_replay
        return not self._is_replay if action == "leave" else True

    def action_hold(self) -> None:
        """Hold a recording, go on, or play it again."""
        source = self._source
        if not isinstance(source, ReplaySource):
            return
        if self._has_ended:
            self._start()
            return
        source.hold(not source.is_held)
        self.notify("Held; space goes on." if source.is_held else "Goes on.", timeout=2)

    def action_leave(self, towards: str) -> None:
        """Go to the list of engines."""
        self.dismiss(towards)

    @property
    def _is_replay(self) -> bool:
        return isinstance(self._watched, Replay)

    def _start(self) -> None:
        self._has_ended = False
        watched = self._watched
        self._source = (
            ReplaySource(watched) if isinstance(watched, Replay) else EngineSource(watched)
        )
        if self._recorder is not None:
            self._recorder.begin(self._source)
        work = partial(read_frames, self._source, self._recorder, self.post_message)
        self.run_worker(work, thread=True, exit_on_error=False)
