"""What the monitor's parts mean, and its keys. Knows no run."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

_KEYS = (
    ("1 to 5", "the pictures: resident, activations, misses, substitutions, loads"),
    ("t", "what happens lately (it fades), or all since the model was loaded"),
    ("arrows, mouse", "ask about an expert; PgUp, PgDn, Home, End go further"),
    ("e", "exact: nobody stands in; again: they may"),
    ("+  -", "the budget: how much of the router's weight stand-ins may carry"),
    ("b", "who stands in, from a list"),
    ("p", "pause between two tokens, and go on"),
    ("Ctrl+P", "all commands, themes among them"),
)
_WATCHER_KEYS = (
    ("space", "hold a replay, and go on"),
    ("l", "back to the list of running engines"),
    ("w", "wait for another engine"),
    ("q", "leave; what is watched goes on"),
)
_CHAT_KEYS = (
    ("Shift+Tab", "to the message and back here"),
    ("F2", "hide the monitor"),
)
_TERMS = (
    ("the map", "a row for each layer, a cell for each expert of it"),
    ("bars beside it", "what became of each layer's choices since the model was loaded"),
    ("slot", "a place in memory for one expert of a layer"),
    ("hit", "the router chose an expert that was in a slot"),
    ("substituted", "another expert, one in a slot, computed in its place"),
    ("on host", "computed by the CPU where the file is mapped"),
    ("loaded", "read into a slot first, which takes the longest"),
    ("dropped", "left out"),
    ("budget", "share of the router's weight, over the last 256 tokens"),
    ("verified", "steps computed again, exactly: KL 0 is equal, same = same token"),
)


class HelpScreen(ModalScreen[None]):
    """Left with Escape."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,question_mark,q,f1", "dismiss(None)", "Back", key_display="Esc"),
    ]

    def __init__(self, is_ascii: bool, is_in_chat: bool) -> None:
        super().__init__()
        self._keys = _KEYS + (_CHAT_KEYS if is_in_chat else _WATCHER_KEYS)
        self.set_class(is_ascii, "-ascii")

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help") as box:
            box.border_title = Content("Help, Esc goes back")
            yield Static(_table("Keys", self._keys), markup=False)
            yield Static(_table("Words", _TERMS), markup=False)
            yield Static(
                "Keys that change a run work where the run was started. Brighter is more in every"
                " picture; the legend says how much, and the sentences below it give the figures.",
                markup=False,
            )


def _table(title: str, rows: tuple[tuple[str, str], ...]) -> Content:
    lines = [Content.styled(title, "bold")]
    lines += [Content.assemble((f"{name:<15}", "$text-accent"), words) for name, words in rows]
    return Content("\n").join(lines) + Content("\n")
