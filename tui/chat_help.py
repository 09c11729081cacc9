"""The screen that explains the keys of the chat."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

TEXT = '''\
In the chat

Enter         send the message
Alt-Enter     break the line; so do Ctrl-J and a \\ at the end
"""           begin and end a message of several lines
Up, Down      earlier messages
Tab           complete a command or a file name
Esc           stop the answer, also while the prompt is read
Ctrl-C        clear the message, stop the answer, or leave
Ctrl-D, /bye  leave
PgUp, PgDn    earlier and later lines; at the end it follows again
/?            the commands of the chat

On the screen

F2            show or hide the monitor of the engine
Shift-Tab     go to the monitor, where it is shown, and back:
              its keys hold there, and ? explains them
Ctrl-P        all commands, colours among them
Ctrl-Z        stop for a while; fg goes on
mouse         marks text, Ctrl-C copies it; with Shift most
              terminals mark and copy by themselves
'''


class ChatHelp(ModalScreen[None]):
    """Goes with any of the usual keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q,enter", "dismiss", "Close")]

    def __init__(self, is_ascii: bool = False) -> None:
        super().__init__()
        self._is_ascii = is_ascii

    def compose(self) -> ComposeResult:
        """The text, which scrolls where it is too long."""
        with VerticalScroll(id="keys"):
            yield Static(Content(TEXT.rstrip()), markup=False)

    def on_mount(self) -> None:
        """Take the keys."""
        self.set_class(self._is_ascii, "-ascii")
        self.query_one("#keys").focus()
