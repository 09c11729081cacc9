"""What the command line asks of the screens, which live above it and are handed in. No Textual."""

from collections.abc import Callable
from dataclasses import dataclass

from runner.engine_client import Client
from runner.protocol import ModelInfo
from runner.recording import Recorder, Replay
from runner.terminal.conversation import Conversation
from runner.terminal.history import LineHistory
from runner.watch import Running


@dataclass(frozen=True)
class MonitorRequest:
    """A monitor of an engine in another process, or of a recording."""

    running: tuple[Running, ...] = ()  # to choose from; a single one is shown at once
    replay: Replay | None = None  # in the place of these
    recorder: Recorder | None = None  # gets every frame that comes
    is_ascii: bool = False  # no characters beyond ASCII


@dataclass(frozen=True)
class ChatRequest:
    """A chat with a loaded model on the whole screen."""

    client: Client
    info: ModelInfo
    conversation: Conversation
    history: LineHistory
    first_message: str = ""
    is_ascii: bool = False


@dataclass(frozen=True)
class Screens:
    """The screens there are; each returns when the person leaves."""

    monitor: Callable[[MonitorRequest], None]
    chat: Callable[[ChatRequest], None]
