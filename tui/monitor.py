"""The whole monitor as one widget: on a screen of its own, or docked beside a chat.

Frames go in with `show`; what a person asks of a run goes to its owner. Knows no socket and no
process.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget

from runner.client import Frame, RunSettings, visible
from tui.heat_grid import HeatGrid, heat_grid
from tui.help_screen import HelpScreen
from tui.history import History
from tui.monitor_layout import MIN_HEIGHT, MIN_WIDTH, room
from tui.owner import Asker, Change, Owner
from tui.policy_screen import PolicyScreen
from tui.views import VIEWS
from tui.widgets.cell_panel import CellPanel
from tui.widgets.headline import Headline
from tui.widgets.heat_map import HeatMap
from tui.widgets.layer_bars import LayerBars, layer_shares
from tui.widgets.legend import Legend
from tui.widgets.memory import Memory
from tui.widgets.pairs import Pairs
from tui.widgets.panel import Panel
from tui.widgets.quality import Quality
from tui.widgets.speed import Speed
from tui.widgets.standins import Standins
from tui.widgets.time_split import TimeSplit
from tui.widgets.too_small import TooSmall
from tui.widgets.view_tabs import ViewTabs

_BUDGET_STEP = 0.01
_DRAWN_EVERY_S = 0.35  # a screen costs some milliseconds, which the engine's threads could use
_MODES = ("tiny", "narrow", "compact", "tall", "full", "wide")
_BUSY = ("prompt", "generating", "measuring")
_NOT_MINE = "This buddyrun is only watched. It can be changed where it was started."
_VIEW_KEYS = Binding.Group("view", compact=True)
_BUDGET_KEYS = Binding.Group("budget", compact=True)


class Monitor(Widget):
    """Show it frames; give it an owner to let keys change the run."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(str(n), f"view({n - 1})", view.name, group=_VIEW_KEYS)
            for n, view in enumerate(VIEWS, 1)
        ),
        Binding("t", "total", "total"),
        Binding("e", "exact", "exact"),
        Binding("plus,equals_sign", "budget(1)", "More", key_display="+", group=_BUDGET_KEYS),
        Binding("minus", "budget(-1)", "Less", key_display="-", group=_BUDGET_KEYS),
        Binding("b", "policy", "policy"),
        Binding("p", "pause", "pause"),
        Binding("question_mark", "help", "help", key_display="?"),
    ]

    frame: reactive[Frame | None] = reactive[Frame | None](None, init=False, repaint=False)
    view: reactive[int] = reactive(0, init=False, repaint=False)
    is_total: reactive[bool] = reactive(False, init=False, repaint=False)

    @dataclass
    class Answered(Message):
        """The owner did what was asked, or said why not."""

        words: str
        is_refused: bool

    def __init__(
        self, owner: Owner | None = None, is_ascii: bool = False, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.owner = owner  # None: only watched
        self._is_ascii = is_ascii
        self._history = History()
        self._shape = (0, 0)  # n_layer, n_expert
        self._asked: RunSettings | None = None  # what will be, while the owner is asked
        self._n_asked = 0
        self._asker = Asker(self._answered)
        self._latest: Frame | None = None  # shown or not
        self._has_ended = False

    def compose(self) -> ComposeResult:
        is_ascii = self._is_ascii
        yield TooSmall(MIN_WIDTH, MIN_HEIGHT)
        yield Headline(is_ascii, self.owner is not None, id="headline")
        with Horizontal(id="body"):
            with Vertical(id="left"):
                yield ViewTabs(id="views")
                with Horizontal(id="map-row"):
                    yield HeatMap(is_ascii, id="heat-map")
                    yield LayerBars(is_ascii, id="layer-bars")
                yield Legend(is_ascii, id="legend")
                yield CellPanel(is_ascii, id="cell")
                yield Standins(is_ascii, "Who stands in, most often first", id="stand-ins")
            with VerticalScroll(id="panels", can_focus=False):
                yield Speed(is_ascii, "Speed", id="speed")
                yield Pairs(is_ascii, "Router's choices", id="pairs")
                yield Memory(is_ascii, "Memory", id="memory")
                yield Quality(is_ascii, "Quality", id="quality")
                yield TimeSplit(is_ascii, "Time", id="time")

    def on_mount(self) -> None:
        self.set_class(self._is_ascii, "-ascii")
        self.watch(self.query_one(HeatMap), "scroll_y", self._follow, init=False)

    def on_unmount(self) -> None:
        self._asker.stop()

    def show(self, frame: Frame) -> None:
        """The next moment of an engine; all are counted, not all are drawn."""
        self._history.add(frame)
        if self._n_asked == 0:
            self._asked = None
        if self._latest is None or self._has_ended:
            self.query_one(Headline).ended = ""
            self._has_ended = False
        self._latest = frame
        if _is_news(self.frame, frame):
            self.frame = frame

    def show_ended(self, reason: str) -> None:
        """No frame follows, for this reason; the last one stays."""
        self._has_ended = True
        self.query_one(Headline).ended = reason
        self.frame = self._latest

    def watch_frame(self, frame: Frame | None) -> None:
        if frame is None:
            return
        counts = frame.stats.experts if frame.stats is not None else None
        missed = counts.missed if counts is not None else ()
        shape = len(missed), len(missed[0]) if missed else 0
        if shape != self._shape:
            self._shape = shape
            self._arrange()
        self._show_grid()
        self.query_one(LayerBars).shares = layer_shares(frame.stats) if counts else ()
        self.query_one(Speed).trend = self._history.trend
        latest = self._history.latest if frame.phase in _BUSY else None
        self.query_one(Headline).rates = latest
        self.query_one(Pairs).rates = latest
        self.query_one(TimeSplit).rates = latest
        for panel in self.query(Panel):
            panel.frame = frame

    def watch_view(self) -> None:
        self._show_grid()

    def watch_is_total(self) -> None:
        self._show_grid()

    def on_resize(self) -> None:
        self._arrange()

    def on_heat_map_cell_shown(self, message: HeatMap.CellShown) -> None:
        self.query_one(CellPanel).cell = message.layer, message.expert

    def on_view_tabs_chosen(self, message: ViewTabs.Chosen) -> None:
        self.view = message.view

    def action_view(self, view: int) -> None:
        """Show another picture of the experts."""
        self.view = view

    def action_total(self) -> None:
        """Show what was counted since loading, or lately."""
        self.is_total = not self.is_total

    def action_help(self) -> None:
        """Explain the screen."""
        self.app.push_screen(HelpScreen(self._is_ascii, is_in_chat=self.owner is not None))

    def action_exact(self) -> None:
        """Let nobody stand in, or let them again."""
        settings = self._settings()
        if settings is not None:
            self._ask(settings, Change(is_exact=not settings.is_exact))

    def action_budget(self, steps: int) -> None:
        """Let stand-ins carry more or less of the router's weight."""
        settings = self._settings()
        if settings is not None:
            budget = round(settings.buddy_budget + steps * _BUDGET_STEP, 4)
            self._ask(settings, Change(buddy_budget=min(1.0, max(0.0, budget))))

    def action_policy(self) -> None:
        """Choose who stands in, from a list."""
        settings = self._settings()
        if settings is not None:
            self.app.push_screen(PolicyScreen(settings.buddy, self._is_ascii), self._choose_policy)

    def action_pause(self) -> None:
        """Hold the answer between two tokens, or let it go on."""
        settings = self._settings()
        if settings is not None:
            self._ask(settings, Change(is_paused=not settings.is_paused))

    def _choose_policy(self, policy: str | None) -> None:
        settings = self._settings()
        if policy is not None and settings is not None:
            self._ask(settings, Change(buddy=policy))

    def _settings(self) -> RunSettings | None:
        """What can be changed, as it is or was asked for last; None is said in words."""
        if self.owner is None:
            self.notify(_NOT_MINE, severity="warning", markup=False)
            return None
        settings = self._asked or (self.frame.settings if self.frame is not None else None)
        if settings is None:
            self.notify("No model is loaded yet.", severity="warning", markup=False)
        return settings

    def _ask(self, settings: RunSettings, change: Change) -> None:
        """Ask the owner; the answer comes as a message."""
        assert self.owner is not None
        wanted = {name: value for name, value in vars(change).items() if value is not None}
        self._asked = replace(settings, **wanted)
        self._n_asked += 1
        self._asker.ask(self.owner, change)

    def _answered(self, words: str, is_refused: bool) -> None:
        """In the asker's thread."""
        self.post_message(self.Answered(visible(words), is_refused))

    def on_monitor_answered(self, message: Answered) -> None:
        self._n_asked -= 1
        if message.is_refused:
            self._asked = None
        self.notify(
            message.words,
            severity="error" if message.is_refused else "information",
            markup=False,
        )

    def _show_grid(self) -> None:
        stats = self.frame.stats if self.frame is not None else None
        grid = heat_grid(self.view, stats, self._history.activity, self.is_total)
        self.query_one(Legend).grid = grid
        self.query_one(HeatMap).grid = grid if not grid.remark else HeatGrid(self.view)
        self.query_one(ViewTabs).view = self.view

    def _arrange(self) -> None:
        """Give every part its room."""
        n_layer, n_expert = self._shape
        width, height = self.size
        place = room(width, height, n_layer, n_expert, self._is_ascii)
        for mode in _MODES:
            self.set_class(place.mode == mode, f"-{mode}")
        heat_map = self.query_one(HeatMap)
        heat_map.make_room(n_layer, n_expert, place.map_width, place.n_rows, place.cell_width)
        heat_map.styles.width = place.map_width
        n_rows = min(place.n_rows, heat_map.places.n_rows)
        self.query_one("#map-row").styles.height = n_rows
        self.query_one("#left").styles.width = place.left_width or "100%"
        self.query_one(LayerBars).places = heat_map.places
        self.query_one(Legend).places = heat_map.places
        self.query_one(Legend).n_rows_shown = n_rows

    def _follow(self, scroll_y: float) -> None:
        self.query_one(LayerBars).first_row = round(scroll_y)


def _is_news(drawn: Frame | None, frame: Frame) -> bool:
    """Whether a frame has to be drawn: time passed, or what a person waits for came about."""
    if drawn is None or frame.time_s < drawn.time_s:
        return True
    if frame.time_s - drawn.time_s >= _DRAWN_EVERY_S:
        return True
    before, now = (drawn.phase, drawn.pid), (frame.phase, frame.pid)
    return before != now or drawn.settings != frame.settings or drawn.model != frame.model
